"""Models in this process: a `ModelSource` whose engines are scripts, for tests of what stands above the runtime."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Self

from stator.llm.card import ModelCard, RuntimeConfig
from stator.llm.output import EngineOutput
from stator.llm.preprocess import Preprocessor
from stator.llm.request import PreprocessedRequest
from stator.llm.served import ServedModel
from stator.llm.template import PlainTemplate
from stator.llm.tokenizer import ByteTokenizer

__all__ = ["EngineCall", "FakeEngine", "FakeModels", "Script", "echo_script"]


class EngineCall:
    """One call as the engine saw it, and how it ended: "" while it runs, then "complete", "failed", "killed" or "refused"."""

    def __init__(
        self, request: PreprocessedRequest, request_id: str, metadata: dict[str, str], headers: dict[str, str]
    ) -> None:
        self.request = request
        self.request_id = request_id
        self.metadata = metadata
        self.headers = headers
        self.entered = False
        self.outcome = ""
        self.ended = asyncio.Event()

    def end(self, outcome: str) -> None:
        """Note the outcome, once."""
        if not self.outcome:
            self.outcome = outcome
            self.ended.set()


Script = Callable[[EngineCall], AsyncGenerator[list[EngineOutput]]]
"""An async generator function: the batches of one call."""


async def echo_script(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
    """Answer with the prompt, a token per batch, at most `max_tokens` of them."""
    tokens = call.request.token_ids
    limit = call.request.stop_conditions.max_tokens
    shown = tokens if limit is None else tokens[:limit]
    for place, token in enumerate(shown):
        last = place == len(shown) - 1
        reason = None if not last else "stop" if len(shown) == len(tokens) else "length"
        yield [EngineOutput(token_ids=[token], finish_reason=reason)]
        await asyncio.sleep(0)


class _Stream:
    def __init__(self, engine: "FakeEngine", call: EngineCall) -> None:
        self._engine = engine
        self._call = call
        self._batches = engine.script(call)

    async def __aenter__(self) -> Self:
        engine = self._engine
        if engine.refusal is not None:
            self._call.end("refused")
            raise engine.refusal
        self._call.entered = True
        engine.running += 1
        engine.most = max(engine.most, engine.running)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.end("killed")
        self._engine.running -= 1
        await self._batches.aclose()
        self._engine.changed()

    def batches(self) -> AsyncIterator[list[EngineOutput]]:
        return self

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> list[EngineOutput]:
        try:
            return await anext(self._batches)
        except StopAsyncIteration:
            self._call.end("complete")
            raise
        except Exception:
            self._call.end("failed")
            raise


class FakeEngine:
    """A `TokenEngine` that runs a script and remembers its calls; `refusal` is raised instead of taking a call.

    `places` is how many calls its workers run at once, None for any number; more are taken all the same. Change it with `resize`.
    """

    def __init__(self, script: Script = echo_script, *, refusal: Exception | None = None, places: int | None = None) -> None:
        self.script = script
        self.refusal = refusal
        self.places = places
        self.running = 0
        self.most = 0
        """the most calls that ran at once"""
        self.listeners: list[Callable[[], None]] = []
        self.calls: list[EngineCall] = []

    def generate(
        self, request: PreprocessedRequest, *, request_id: str, metadata: dict[str, str], headers: dict[str, str]
    ) -> _Stream:
        call = EngineCall(request, request_id, metadata, headers)
        self.calls.append(call)
        return _Stream(self, call)

    def room(self) -> int | None:
        return None if self.places is None else self.places - self.running

    def pressure(self) -> str:
        return "" if self.places is None or self.running < self.places else f"{self.running} of {self.places} places taken"

    def on_room(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.listeners.append(callback)
        return lambda: self.listeners.remove(callback)

    def resize(self, places: int | None) -> None:
        """So many places from now on."""
        self.places = places
        self.changed()

    def changed(self) -> None:
        """Tell who listens that there may be room."""
        for listener in tuple(self.listeners):
            listener()


class FakeModels:
    """A `ModelSource` over engines by model name; entries may come and go."""

    def __init__(self, *, context_length: int = 65_536) -> None:
        self._context_length = context_length
        self._models: dict[str, ServedModel] = {}
        self._alive: dict[str, list[int]] = {}

    def add(
        self,
        name: str,
        engine: FakeEngine,
        *,
        model_type: str = "Chat | Completions",
        created: float = 1.7e9,
        instances: Sequence[int] = (1,),
    ) -> FakeEngine:
        """Serve `engine` as `name` on `instances`, with the byte tokenizer and the plain template."""
        card = ModelCard(
            display_name=name, model_type=model_type, runtime_config=RuntimeConfig(context_length=self._context_length)
        )
        preprocessor = Preprocessor(card, ByteTokenizer(), PlainTemplate())
        alive = self._alive[name] = list(instances)
        self._models[name] = ServedModel(
            name=name, card=card, preprocessor=preprocessor, engine=engine, created=1.7e9, instances=lambda: alive
        )
        return engine

    def remove(self, name: str) -> None:
        """The last worker left."""
        del self._models[name]
        self._alive.pop(name).clear()

    def get(self, name: str) -> ServedModel | None:
        return self._models.get(name)

    def models(self) -> list[ServedModel]:
        return [self._models[name] for name in sorted(self._models)]
