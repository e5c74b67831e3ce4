"""Why a request was not taken, and how people are told."""

from typing import Literal

import msgspec

from stator.frontend.admission_limits import AdmissionLimits

__all__ = ["Reason", "Refusal"]

Reason = Literal["queue", "wait", "overload", "timeout", "worker"]
"""the queue is full; it would wait too long; the same while the queue stands; it did or would for longer than anybody may; a worker
refused what was let in
"""


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """`wait` is how long the request would have waited, in seconds, as far as that is known; else 0."""

    reason: Reason
    wait: float = 0.0
    waiting: int = 0
    """calls of its class that wait"""
    held: int = 0
    """those of them that are its tenant's"""

    def text(self, limits: AdmissionLimits) -> str:
        """Which limit it was, and which value."""
        match self.reason:
            case "queue":
                return f"{self.waiting} calls wait, {self.held} of them yours (http.queue = {limits.depth})"
            case "wait":
                wait = f"{self.wait:.2g} s" if self.wait else "of unknown length"
                return f"the wait would be {wait} (http.queue_wait = {limits.wait:g} s)"
            case "overload":
                target = f"http.queue_target = {limits.target:g} s, since the queue does not empty"
                return f"the wait would be {self.wait:.2g} s ({target})"
            case "timeout":
                return f"no place comes free in time (http.queue_timeout = {limits.timeout:g} s)"
            case "worker":
                return "a worker refused it"
