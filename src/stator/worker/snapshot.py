"""What an engine's scheduler knows of one data-parallel rank, and the door it is pushed through (`spec/45 §8`)."""

from collections.abc import Sequence
from typing import Protocol

import msgspec

__all__ = ["ComponentSnapshot", "SnapshotSink"]


class ComponentSnapshot(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One rank at one moment. The rank is said to `publish`, not here."""

    kv_used_blocks: int
    kv_total_blocks: int
    gpu_cache_usage: float
    """0 … 1"""
    kv_cache_hit_rate: float | None = None
    """0 … 1; None: no data, or no prefix cache: the gauge is left as it is. 0.0 is a value."""


class SnapshotSink(Protocol):
    """`SnapshotPublisher`, as an engine sees it."""

    @property
    def dp_ranks(self) -> Sequence[int]:
        """The declared ranks, sorted."""
        ...

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        """From any thread; never blocks, never raises. A rank that was not declared is dropped and counted."""
        ...
