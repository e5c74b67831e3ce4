"""An engine that can be killed while its process lives: its tokens need a child process, or a thread, to be alive.

`stator worker --engine dying_engine:Dying`. Once it is dead, what it was generating hangs, as a call to a dead process would.
"""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, ClassVar

from stator.config import Config, Setting
from stator.errors import ConfigError, EngineError
from stator.llm.card import byte_card
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.worker import EngineConfig, LLMEngine

CHILD = "import sys; sys.stdin.read()"


class Options(Config, frozen=True, kw_only=True):
    """How it works, and how long its clean-up takes."""

    section: ClassVar[str] = "dying"

    says: Annotated[bool, Setting(doc="notice the death by itself; otherwise a request does")] = True
    starts: Annotated[bool, Setting(doc="whether it can be started")] = True
    cleanup: Annotated[float, Setting(doc="time its clean-up takes", unit="s", ge=0)] = 0.0


class Dying(LLMEngine):
    """Answers with the prompt, a token every few milliseconds, while its child and its thread live."""

    options_type = Options

    def __init__(self, options: Options) -> None:
        self.options = options
        self.child: asyncio.subprocess.Process | None = None
        self.crash = threading.Event()
        self.thread = threading.Thread(target=self.crash.wait, name="generation", daemon=True)

    async def start(self, instance_id: int) -> EngineConfig:
        if not self.options.starts:
            raise ConfigError("no weights")
        pipe = asyncio.subprocess.PIPE
        self.child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, stdin=pipe)
        self.thread.start()
        card = await asyncio.to_thread(byte_card, "dying")
        return EngineConfig(model="dying", card=card, max_num_seqs=64)

    @property
    def dead(self) -> bool:
        """Whether nothing can be generated any more."""
        return not self.thread.is_alive() or self.child is None or self.child.returncode is not None

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        for token in request.token_ids:
            await asyncio.sleep(0.005)
            if self.dead and not self.options.says:
                raise EngineError("the model does not answer", kind="EngineShutdown")
            if self.dead:
                await asyncio.Event().wait()
            yield EngineOutput(token_ids=[token])
        yield EngineOutput(token_ids=[], finish_reason="stop")

    def controls(self) -> Mapping[str, Any]:
        return {"crash": self.crash_thread}

    async def crash_thread(self, body: Any) -> Any:
        """As if there were a mistake in the thread."""
        self.crash.set()
        return {"status": "ok"}

    async def failed(self) -> str:
        assert self.child is not None
        if not self.options.says:
            await asyncio.Event().wait()
        while not self.dead:
            await asyncio.sleep(0.01)
        if self.thread.is_alive():
            return f"the model's process ended with status {await self.child.wait()}"
        return "the generation thread crashed"

    async def cleanup(self) -> None:
        await asyncio.sleep(self.options.cleanup)
        self.crash.set()
        if self.child is not None and self.child.returncode is None:
            self.child.kill()
            await self.child.wait()
