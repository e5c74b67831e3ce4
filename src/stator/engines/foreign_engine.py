"""What the adapters of vLLM and SGLang have in common: finding the library, its ranks' load and cache events, letting go of it."""

import asyncio
import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from stator.engines.arguments import missing_extra
from stator.engines.hosted import HostedEngine, card_of
from stator.engines.loopback_ports import free_ports
from stator.engines.model_options import need_model
from stator.errors import ConfigError, StatorError
from stator.kv.sources import KvEventSource, ZmqSource
from stator.llm.card import ModelCard
from stator.worker.snapshot import ComponentSnapshot, SnapshotSink

__all__ = ["ForeignEngine", "ForeignOptions"]


class ForeignOptions(Protocol):
    """What settings of such an engine have alike."""

    @property
    def model(self) -> str: ...

    @property
    def kv_events(self) -> bool: ...


class ForeignEngine(HostedEngine):
    """Around an engine of another library that spreads one model over ranks: each has a cache, a load and KV events of its own.

    All that touches the library is the module `stator.engines.<name>_library`, imported when the engine starts; it has an
    `error_of(error) -> StatorError`.
    """

    def __init__(self, name: str, options: ForeignOptions) -> None:
        """Raises `ConfigError` without a model."""
        super().__init__(name)
        need_model(name, options.model)
        self._engine: Any = None
        self._library: Any = None
        self._ranks = 1
        self._total_blocks = 0
        """of one rank; 0: not known"""
        self._snapshots: SnapshotSink | None = None
        self._kv_port = 0
        """the first of one per rank; 0: no KV events"""
        self._model = options.model
        self._kv_events = options.kv_events

    # -- steps of `load`

    async def _import_library(self, called: str, *, oldest: str) -> Any:
        """Our side of the library, which people know as `called`. Raises `ConfigError` when it is missing, or older than `oldest`."""
        self.report(f"importing {self._name}")
        try:
            self._library = await asyncio.to_thread(importlib.import_module, f"stator.engines.{self._name}_library")
        except ModuleNotFoundError as error:
            raise missing_extra(self._name, error) from error
        except ImportError as error:
            raise ConfigError(f"this version of {called} is not supported, {oldest} and later are: {error}") from error
        return self._library

    def _reserve_kv_endpoint(self, arguments: Mapping[str, object]) -> str | None:
        """Where publishers of KV events are to connect to; rank r to port + r. None: there are none, or the operator's `arguments`
        say where."""
        if not self._kv_events or "kv_events_config" in arguments:
            return None
        self._kv_port = free_ports(self._ranks)
        return self._kv_address(0)

    def _kv_address(self, rank: int) -> str:
        return f"tcp://127.0.0.1:{self._kv_port + rank}"

    async def _card(self) -> ModelCard:
        return await asyncio.to_thread(card_of, self._model, report=self.report)

    # -- HostedEngine

    def error_of(self, error: Exception) -> StatorError:
        return self._library.error_of(error)

    async def unload(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.shutdown()

    # -- LLMEngine: load and events

    def snapshot_ranks(self) -> Sequence[int]:
        return range(self._ranks) if self._total_blocks else ()

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        """Empty caches to begin with, then what the library says."""
        self._snapshots = sink
        for rank in range(self._ranks):
            self._publish(rank, used_blocks=0, usage=0.0, hit_rate=None)

    def _publish(self, rank: int, *, used_blocks: int, usage: float, hit_rate: float | None) -> None:
        """`usage` and `hit_rate` are 0 … 1. Over there, too."""
        if self._snapshots is None or not self._total_blocks or not 0 <= rank < self._ranks:
            return
        snapshot = ComponentSnapshot(
            kv_used_blocks=used_blocks,
            kv_total_blocks=self._total_blocks,
            gpu_cache_usage=usage,
            kv_cache_hit_rate=hit_rate,
        )
        self._snapshots.publish(rank, snapshot)

    def kv_event_sources(self) -> Sequence[KvEventSource]:
        """The library's publishers connect to us, one port per rank: they would bind all interfaces of the machine otherwise."""
        if not self._kv_port:
            return ()
        return [ZmqSource(endpoint=self._kv_address(rank), dp_rank=rank, bind=True) for rank in range(self._ranks)]
