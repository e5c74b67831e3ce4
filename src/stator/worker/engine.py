"""What an engine is: `generate` with a life cycle (`spec/45 §1`)."""

import asyncio
from abc import abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import msgspec

from stator.config import Config
from stator.kv.sources import KvEventSource
from stator.llm.card import ModelCard
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest
from stator.runtime.context import Context
from stator.worker.engine_metrics import EngineMetrics
from stator.worker.snapshot import SnapshotSink

__all__ = ["EngineCommand", "EngineConfig", "LLMEngine"]

EngineCommand = Callable[[Any], Awaitable[Any]]
"""a JSON value in (an empty body is `{}`), a JSON value out"""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine knows of itself once it is ready. None: not advertised. Lengths are in tokens.

    `card` describes the model's files; the worker fills in the served name and the limits below.
    """

    model: str
    """the engine's own name of the model: a directory, an id or a word"""
    card: ModelCard
    served_name: str | None = None
    """the name clients ask for; default: the card's"""
    context_length: int | None = None
    kv_cache_block_size: int | None = None
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    """sequences that generate at once, per rank; the worker takes that many requests and lets few wait (`slots`)"""
    max_num_batched_tokens: int | None = None
    """tokens of one forward pass"""
    data_parallel_size: int = 1
    data_parallel_start_rank: int = 0
    runtime_data: dict[str, Any] | None = None
    """anything else readers of the card may want"""

    @property
    def slots(self) -> int | None:
        """Requests that are run at once, over all ranks; None: no limit. One for several choices counts as one: what is too much
        for the engine waits in the engine.
        """
        return None if self.max_num_seqs is None else self.max_num_seqs * max(1, self.data_parallel_size)


class LLMEngine(Protocol):
    """Generates tokens. Subclass it to inherit what is optional. A constructor, if there is one, takes one config struct, an
    `options_type`.

    Order of calls: `follow_progress`, `start`, `register_metrics`, `snapshot_ranks`, `kv_event_sources`,
    `attach_snapshots`, `controls`, `updates`, `health_payload`, then `generate` and `abort` any number of times while `failed` is waited
    for, `drain`, `cleanup`. `cleanup` comes exactly once, also after a `start` that raised, never in parallel with it. What the
    hooks between `start` and `health_payload` raise ends the start as an error of `start` does; a broken `health_payload` only
    means that there is no canary (`spec/45 §3`).
    """

    options_type: ClassVar[type[Config]] = Config

    def follow_progress(self, report: Callable[[str], None]) -> None:
        """From now until `start` returns, tell `report` in a few words what is being waited for.

        Called in the event loop's thread.
        """

    @abstractmethod
    async def start(self, instance_id: int) -> EngineConfig:
        """Load the model; when it returns, `generate` works. `instance_id` is unique and stable for the life of the process.

        Whatever it raises ends the worker with one line; a `StatorError`'s message is shown as it is.
        """
        ...

    @abstractmethod
    def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        """Answer with one choice (index 0, unless `native_choices`): items in order, the last one has a `finish_reason`.

        Called concurrently. Usually an async generator. A plain function returning an iterator may raise `Overloaded` at
        once: the request is then refused and goes to another worker. Errors of the request are `EngineError` of kind
        `InvalidArgument` (or ValueError), raised while iterating. Once `context.is_stopped`, end soon with the finish
        reason `cancelled`; when the request is killed, the generator is cancelled at its await and must free everything.
        """
        ...

    native_choices: ClassVar[bool] = False
    """whether `generate` itself honours `sampling_options.n`; otherwise the worker calls it n times"""

    async def abort(self, context: Context) -> None:
        """The request was stopped or killed: wake it up, free its slot.

        Not called at a normal end. Errors are logged and go no further.
        """

    def register_metrics(self, metrics: EngineMetrics) -> None:
        """Add metrics of the engine's own to the worker's page."""

    def snapshot_ranks(self) -> Sequence[int]:
        """The data-parallel ranks that will publish snapshots, the same at each call; empty: none, and `attach_snapshots` is not called."""
        return ()

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        """Keep `sink` and publish through it whenever the scheduler knows something new, from any thread, until `cleanup`."""

    def kv_event_sources(self) -> Sequence[KvEventSource]:
        """Where the KV events of each rank come from, the same ranks at each call."""
        return ()

    def health_payload(self) -> Mapping[str, Any] | None:
        """A small request that the canary may send; it is marked with `_HEALTH_CHECK`. None: a request for one token, greedy.

        Return `{}` for no canary at all.
        """
        return None

    def controls(self) -> Mapping[str, EngineCommand]:
        """Commands under `/engine/control/` of the status server. `sleep`, `pause_generation` and `release_memory_occupation` are called
        after the endpoint has left discovery; `wake_up`, `resume_generation` and `resume_memory_occupation` bring it back when they
        succeed: an answer without `"status": "error"` and without `"success": false` (`spec/45 §11`).
        """
        return {}

    def updates(self) -> Mapping[str, EngineCommand]:
        """Commands under `/engine/update/`."""
        return {}

    async def failed(self) -> str:
        """Return in a few words why, once the engine can generate no more (its process died, its loop crashed). Cancelled at the end.

        The worker then leaves discovery at once, reports itself sick and ends. The default never returns.
        """
        await asyncio.Event().wait()
        return ""

    async def drain(self) -> None:
        """No new requests will come and those running have ended or are about to be killed: finish what outlives requests."""

    async def cleanup(self) -> None:
        """Free everything. Must do no harm after a `start` that failed half-way, without `start`, or when called again."""
