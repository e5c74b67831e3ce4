"""What engines around a library with an event loop of its own have in common: vLLM and SGLang."""

import asyncio
import itertools
import logging
from abc import abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from typing import Any

from stator.engines.loop_thread import LoopThread
from stator.engines.output_inbox import OutputInbox
from stator.errors import EngineError, StatorError
from stator.llm.card import ModelCard, card_from_directory
from stator.llm.output import CompletionUsage, EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.worker.engine import EngineConfig, LLMEngine

__all__ = ["HostedEngine", "card_of"]

logger = logging.getLogger(__name__)

_STOP_LIMIT = 30.0
"""seconds that the library's loop may take to end"""


class HostedEngine(LLMEngine):
    """Runs `load`, `answer` and `unload` in a thread with an event loop: the library may block it, which loading does for minutes,
    and finds itself outside of the main thread, where it leaves the process' signals alone.

    Outputs come back in one call per turn of that loop. A request that is stopped ends at once here; over there its `answer`
    is cancelled.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._thread: LoopThread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._report: Callable[[str], None] = lambda text: None
        self._inboxes: dict[Context, OutputInbox] = {}
        self._tasks: dict[OutputInbox, asyncio.Task[None]] = {}
        """over there"""
        self._outgoing: list[tuple[OutputInbox, EngineOutput | Exception]] = []
        """over there"""
        self._numbers = itertools.count(1)
        self._dead = asyncio.Event()
        self._death = ""

    # -- for the library; called over there

    @abstractmethod
    async def load(self, instance_id: int) -> EngineConfig:
        """Load the model; when it returns, `answer` works. Raises `ConfigError` with one line for the operator."""
        ...

    @abstractmethod
    def answer(self, request: PreprocessedRequest, request_id: str) -> AsyncGenerator[EngineOutput]:
        """An async generator: choice 0, items in order, the last one has a finish reason. `request_id` is unique.

        It is cancelled when nobody wants more, and must then free everything.
        """
        ...

    @abstractmethod
    def error_of(self, error: Exception) -> StatorError:
        """What the library raised in `answer`, for the caller. One of kind `EngineShutdown` means that the engine has died."""
        ...

    @abstractmethod
    async def unload(self) -> None:
        """Give everything back, also after a `load` that failed. Nothing runs any more."""
        ...

    def report(self, text: str) -> None:
        """Tell in a few words what is being waited for. Any thread."""
        self._post(self._report, text)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run `work` over there until it ends or the engine is cleaned up. Over there."""
        if self._thread is not None:
            self._thread.scope.spawn(work, name=f"{self._name}: {work.__name__}")

    def died(self, reason: str) -> None:
        """The engine can generate no more. Any thread."""
        self._post(self._end, reason)

    # -- LLMEngine

    def follow_progress(self, report: Callable[[str], None]) -> None:
        self._report = report

    async def start(self, instance_id: int) -> EngineConfig:
        self._loop = asyncio.get_running_loop()
        self._thread = LoopThread(f"stator-{self._name}")
        await self._thread.start()
        return await self._thread.run(self.load(instance_id))

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        thread = self._thread
        if thread is None or self._death:
            raise EngineError(self._death or "the engine is not running", kind="EngineShutdown")
        if not request.token_ids:
            raise EngineError("token_ids must not be empty", kind="InvalidArgument")
        limit = request.stop_conditions.max_tokens
        if limit is not None and limit < 1:
            yield _ended("length", len(request.token_ids), 0)
            return
        inbox = self._inboxes[context] = OutputInbox()
        thread.post(self._begin, inbox, request, f"{context.id}-{next(self._numbers)}")
        count = 0
        try:
            while not context.is_stopped:
                for output in await inbox.take():  # token path
                    count += len(output.token_ids)
                    yield output
                    if output.finish_reason is not None:
                        return
            yield _ended("cancelled", len(request.token_ids), count)
        finally:
            del self._inboxes[context]
            thread.post(self._abandon, inbox)

    async def abort(self, context: Context) -> None:
        """Gives up the request's slot, whether its reader goes on or not, and wakes it: it then ends as `cancelled`."""
        inbox = self._inboxes.get(context)
        if inbox is not None:
            inbox.wake()
            if self._thread is not None:
                self._thread.post(self._abandon, inbox)

    async def failed(self) -> str:
        await self._dead.wait()
        return self._death

    async def cleanup(self) -> None:
        thread, self._thread = self._thread, None
        if thread is None:
            return
        for inbox in self._inboxes.values():
            inbox.fail(EngineError("the engine is shutting down", kind="EngineShutdown"))
        try:
            await thread.run(self.unload())
        finally:
            if not await thread.stop(_STOP_LIMIT):
                logger.error("the loop of %s did not end within %g s", self._name, _STOP_LIMIT)

    # -- over there

    def _begin(self, inbox: OutputInbox, request: PreprocessedRequest, request_id: str) -> None:
        thread = self._thread
        if thread is not None and not thread.scope.closed:
            self._tasks[inbox] = thread.scope.spawn(self._pump(inbox, request, request_id), name=request_id)

    def _abandon(self, inbox: OutputInbox) -> None:
        task = self._tasks.pop(inbox, None)
        if task is not None:
            task.cancel()

    async def _pump(self, inbox: OutputInbox, request: PreprocessedRequest, request_id: str) -> None:
        try:
            async for output in self.answer(request, request_id):
                self._send(inbox, output)
        except Exception as error:
            mapped = error if isinstance(error, StatorError) else self.error_of(error)
            if mapped is not error:
                mapped.__cause__ = error
            self._send(inbox, mapped)
            if isinstance(mapped, EngineError) and mapped.kind == "EngineShutdown":
                self.died(mapped.message)
        else:
            self._send(inbox, EngineError("the answer ended without a finish reason"))  # nobody reads on after one
        finally:
            self._tasks.pop(inbox, None)

    def _send(self, inbox: OutputInbox, item: EngineOutput | Exception) -> None:
        """Collect what the tasks of this turn have, then cross over once."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._cross)
        self._outgoing.append((inbox, item))

    def _cross(self) -> None:
        outgoing, self._outgoing = self._outgoing, []
        self._post(_deliver, outgoing)

    # -- back

    def _post(self, function: Callable[..., object], *arguments: object) -> None:
        """Have a function called in the loop of `start`, unless it is gone."""
        try:
            if self._loop is not None:
                self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            logger.debug("nobody is left to tell")

    def _end(self, reason: str) -> None:
        if self._death:
            return
        self._death = reason or "it does not say why"
        for inbox in self._inboxes.values():
            inbox.fail(EngineError(self._death, kind="EngineShutdown"))
        self._dead.set()


def card_of(model: str, *, report: Callable[[str], None]) -> ModelCard:
    """The card of a directory, or of a model by its id on the hub. Blocks. Raises `ConfigError`."""
    from stator.engines.model_source import TEXT_FILES, local_directory  # it needs what only an extra brings

    return card_from_directory(local_directory(model, files=TEXT_FILES, report=report), name=model)


def _deliver(items: list[tuple[OutputInbox, EngineOutput | Exception]]) -> None:
    for inbox, item in items:
        if isinstance(item, EngineOutput):
            inbox.put(item)
        else:
            inbox.fail(item)


def _ended(reason: str, prompt: int, count: int) -> EngineOutput:
    usage = CompletionUsage(prompt_tokens=prompt, completion_tokens=count, total_tokens=prompt + count)
    return EngineOutput(token_ids=[], finish_reason=reason, completion_usage=usage)
