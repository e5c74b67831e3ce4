"""What the frontend sees of a model: a name, a way from requests to tokens and back, and an engine behind it.

Only interfaces and one value; `directory` implements them over discovery and the runtime, tests with fakes.
"""

from collections.abc import AsyncIterator, Callable, Sequence
from types import TracebackType
from typing import Protocol, Self

import msgspec

from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.preprocess import Preprocessor
from stator.llm.request import PreprocessedRequest

__all__ = ["ModelSource", "ServedModel", "TokenEngine", "TokenStream"]


class TokenStream(Protocol):
    """One running request. An async context manager: leaving the block before the end kills the request at the worker."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def batches(self) -> AsyncIterator[list[EngineOutput]]:
        """The items in order; each list is non-empty and holds all that is ready now. Iterate once.

        Raises the request's typed `StatorError` where the stream fails, `EngineError` for an item of another shape; items
        before it are delivered. Cancelling a wait loses nothing: the next call goes on.
        """
        ...


class TokenEngine(Protocol):
    """Generates tokens for one model, on any of its workers."""

    def generate(
        self, request: PreprocessedRequest, *, request_id: str, metadata: dict[str, str], headers: dict[str, str]
    ) -> TokenStream:
        """Describe the request; nothing is sent before the stream is entered.

        `metadata` and `headers` travel in the envelope. Entering raises `Unavailable`, `Overloaded`, `Timeout` or
        `Disconnected` when no worker took the request.
        """
        ...

    def room(self) -> int | None:
        """How many more requests the workers can take now, as far as this process knows; None: there is no limit.

        0 when every worker is busy (`llm.monitor`) or carries as many requests as it runs at once; those of this process count. 0 as
        well when there is no worker.
        """
        ...

    def pressure(self) -> str:
        """Why there is no room, for people: which limit, which value. "" if there is room."""
        ...

    def on_room(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback`, in the event loop's thread, whenever there may be more room than before: a request ended, a worker is
        no longer busy, a worker came. Returns what ends it.
        """
        ...


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of `/v1/models`. `created` is wall time in seconds; `instances()` lists the ids of the workers alive now."""

    name: str
    card: ModelCard
    preprocessor: Preprocessor
    engine: TokenEngine
    created: float
    instances: Callable[[], Sequence[int]]


class ModelSource(Protocol):
    """The models of this moment; never blocks."""

    def get(self, name: str) -> ServedModel | None:
        """The model clients know as `name`, or None."""
        ...

    def models(self) -> list[ServedModel]:
        """All models, sorted by name."""
        ...
