"""Where KV events come from: an engine that calls us, or one that has a socket of its own (`spec/45 §9`)."""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

__all__ = ["KvEventSink", "KvEventSource", "PushSource", "ZmqSource"]


class KvEventSink(Protocol):
    """One rank's publisher, as an engine sees it. All methods may be called from any thread; they never block and never raise."""

    def stored(
        self,
        *,
        token_ids: Sequence[int],
        block_hashes: Sequence[int],
        parent_hash: int | None = None,
        lora_name: str | None = None,
        tier: str = "device",
    ) -> None:
        """Full blocks came into the cache, a chain in order: `block_hashes[i]` has the tokens `token_ids[i·size : (i+1)·size]`.

        Hashes are the engine's own, any unique 64-bit values, signed or not; `parent_hash` is that of the block before the first, None at
        the start of a sequence.
        """
        ...

    def removed(self, block_hashes: Sequence[int], *, tier: str = "device") -> None:
        """Blocks left the cache."""
        ...

    def cleared(self) -> None:
        """The cache is empty."""
        ...


class PushSource(msgspec.Struct, frozen=True, kw_only=True):
    """The engine calls: `on_ready` gets the sink of `dp_rank`, once, in the event loop's thread."""

    on_ready: Callable[[KvEventSink], None]
    dp_rank: int = 0


class ZmqSource(msgspec.Struct, frozen=True, kw_only=True):
    """The engine has a PUB socket in the form of vLLM and SGLang (`spec/40 §4.3`)."""

    endpoint: str
    topic: str = ""
    dp_rank: int = 0
    bind: bool = False
    """whether the engine connects to us and not we to it: those engines bind all interfaces of a machine, or none"""


KvEventSource = PushSource | ZmqSource
