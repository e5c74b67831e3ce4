"""Is the other side alive? Decided from silence, PINGs and the pulse (`docs/native-plane.md §8`)."""

from enum import Enum

import msgspec

from stator.errors import ConfigError

__all__ = ["CLIENT_LIMITS", "WORKER_LIMITS", "Liveness", "LivenessLimits", "Verdict"]

_LOOK_BUSY = 0.1
"""seconds between looks at a connection with streams, at most"""

_LOOK_IDLE = 1.0
"""the same without streams"""


class LivenessLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. With streams open: PING after `silence`, suspect `answer` later, dead at `dead` since the silence began (for a client,
    unless the pulse answers). Without streams: PING every `idle_ping`, close after `idle_close`."""

    silence: float = 1.0
    answer: float = 1.0
    dead: float = 2.5
    idle_ping: float = 20.0
    idle_close: float = 120.0

    def __post_init__(self) -> None:
        if not 0 < self.silence < self.silence + self.answer < self.dead:
            raise ConfigError(
                f"liveness needs silence + answer < dead, all above 0: {self.silence} + {self.answer} against {self.dead}"
            )


CLIENT_LIMITS = LivenessLimits()
WORKER_LIMITS = LivenessLimits(silence=10.0, answer=10.0, dead=30.0, idle_close=150.0)
"""the worker is patient; the client closes idle connections first"""


class Verdict(Enum):
    """What `Liveness.judge` asks of its connection."""

    FINE = "fine"
    PING = "ping"
    SUSPECT = "suspect"
    """unanswered: stop choosing the instance and ask its pulse"""
    DEAD = "dead"
    IDLE = "idle"
    """close it: no streams for long"""


class Liveness:
    """The judgement of one connection. Every method takes `now` in seconds of one clock; `judge` is called every tick of the wheel."""

    __slots__ = ("_asking", "_heard", "_idle_since", "_limits", "_pinged", "_pulse", "_tick", "suspect")

    def __init__(self, limits: LivenessLimits, now: float) -> None:
        self._limits = limits
        self._asking: float | None = None
        self._heard = now
        self._tick = now
        self._idle_since = now
        self._pinged: float | None = None
        self._pulse = float("-inf")
        self.suspect = False

    def look_again(self, streams: int) -> float:
        """Seconds until `judge` wants to be called again; much shorter than what it takes for a gap in which we were away."""
        silence = self._limits.silence
        return min(_LOOK_BUSY, silence / 4) if streams else min(_LOOK_IDLE, silence / 2)

    def heard(self, now: float) -> bool:
        """Bytes arrived. True when this ends a suspicion."""
        self._heard = now
        self._pinged = self._asking = None
        recovered, self.suspect = self.suspect, False
        return recovered

    def pulse(self, now: float) -> None:
        """The pulse answered: blocked, not dead."""
        self._pulse = now

    def judge(self, now: float, *, streams: int) -> Verdict:
        """What to do now. A gap of more than `silence` since the last call means that we ourselves were away: silence is counted anew
        from here. A suspicion outlives the streams: only hearing something ends it.
        """
        limits = self._limits
        if now - self._tick > limits.silence:
            self._heard = now
            self._pinged = self._asking = None
        self._tick = now
        if streams:
            self._idle_since = now
            return self._judge_busy(now)
        self._asking = None
        if now - self._idle_since >= limits.idle_close:
            return Verdict.IDLE
        if now - self._heard >= limits.idle_ping and self._pinged is None:
            self._pinged = now
            return Verdict.PING
        if self._pinged is not None and now - self._pinged >= limits.idle_ping:
            return Verdict.DEAD
        return Verdict.FINE

    def _judge_busy(self, now: float) -> Verdict:
        limits = self._limits
        if self._pinged is None:
            if now - self._heard < limits.silence:
                return Verdict.FINE
            self._pinged = now
            return Verdict.PING
        waited = now - self._pinged
        if waited < limits.answer:
            return Verdict.FINE
        if self._asking is None:
            self._asking = now
        patience = limits.dead - limits.silence
        # The PING may be of an idle time, in which no pulse was asked: the pulse gets its time all the same.
        if waited >= patience and now - max(self._asking, self._pulse) >= patience - limits.answer:
            return Verdict.DEAD
        self.suspect = True
        return Verdict.SUSPECT
