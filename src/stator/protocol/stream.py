"""The life of one stream, as its reader sees it: the one place that decides how a request ends.

    CONNECT ─▶ ACCEPT ─▶ CALL_HOME ─▶ PROLOGUE ─▶ FIRST_ITEM ─▶ ITEMS ─▶ ENDED
       └─────────┴───────────┴────────────┴────────────┴── finish / cut ──▲

Every plane feeds the same `Receiver`: `advance` and `accept` (the prologue), `receive` (items), `finish` (the sentinel, with or without
an error), `cut` (the connection ended first). The first of `finish` and `cut` decides; whatever comes later is dropped silently,
so that crossing KILL and END, or a sentinel and the reset behind it, have one outcome (`spec/10 §3.4–3.5`).
"""

from collections import deque
from collections.abc import Iterable
from enum import IntEnum
from typing import Any

from stator.errors import Disconnected, StatorError, StreamIncomplete

__all__ = ["Phase", "Receiver"]


class Phase(IntEnum):
    """What the reader waits for next."""

    CONNECT = 0
    """a connection to the instance"""
    ACCEPT = 1
    """the acknowledgement (compatible) or ACCEPT (native)"""
    CALL_HOME = 2
    """compatible plane only: the worker acknowledged and has not connected back; it may be queueing"""
    PROLOGUE = 3
    """compatible plane: connected back, handler not yet called; native plane: the request waits for a slot (QUEUED)"""
    FIRST_ITEM = 4
    ITEMS = 5
    ENDED = 6

    @property
    def label(self) -> str:
        """The phase as errors and metrics name it, e.g. "first item"."""
        return self.name.lower().replace("_", " ")


_FIRST_ITEM, _ITEMS, _ENDED = Phase.FIRST_ITEM, Phase.ITEMS, Phase.ENDED


class Receiver:
    """State of the receiving half. Not a plane, not a task: methods are called in order of arrival and never block.

    `items` holds what arrived and was not taken, decoded as `item_type` (any type msgspec can decode). `error` is meaningful once
    `phase` is ENDED: None means complete.
    `changed` is called after every step that a waiting reader may care about.
    """

    __slots__ = ("delivered", "error", "instance", "item_type", "items", "phase")

    def __init__(self, *, instance: int = 0, item_type: Any = Any) -> None:
        self.instance = instance
        self.item_type = item_type
        self.phase: Phase = Phase.CONNECT
        self.delivered = False
        """whether an item ever arrived: after that nothing may be retried"""
        self.items: deque[Any] = deque()
        self.error: StatorError | None = None

    def changed(self) -> None:
        """Told after each step; the asyncio side wakes its reader here."""

    def arrived(self) -> None:
        """Told after items: the same, for those who can do it faster. Token path."""
        self.changed()

    @property
    def ended(self) -> bool:
        """Whether the outcome is decided (items may still wait to be taken)."""
        return self.phase is _ENDED

    def advance(self, phase: Phase) -> None:
        """Move on to a later phase of the opening; going back is ignored, since acknowledgement and call-home race."""
        if self.phase < phase < _ENDED:
            self.phase = phase
            self.changed()

    def accept(self) -> None:
        """The prologue said yes."""
        self.advance(_FIRST_ITEM)

    def receive(self, items: Iterable[Any]) -> bool:
        """Take decoded items; an item implies acceptance. False when the stream had ended and they were dropped."""
        if self.phase is _ENDED:
            return False
        self.phase = _ITEMS
        self.delivered = True
        self.items.extend(items)
        self.arrived()
        return True

    def finish(self, error: StatorError | None = None) -> bool:
        """The sentinel, or a typed error in its place. False if the outcome was decided before."""
        if self.phase is _ENDED:
            return False
        self.phase = _ENDED
        if error is not None and not error.instance:
            error.instance = self.instance
        self.error = error
        self.changed()
        return True

    def cut(self, reason: str) -> bool:
        """The connection ended without sentinel: `StreamIncomplete` after the first item, `Disconnected` before it."""
        kind = StreamIncomplete if self.phase is _ITEMS else Disconnected
        return self.finish(kind(reason, instance=self.instance, phase=self.phase.label))
