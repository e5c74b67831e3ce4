"""Whether etcd answers, and what its silence means for records that seem to be gone.

Several tasks talk to etcd; contact is lost when one of them gets no answer, and back when all of them do. After a silence nobody
can tell a dead owner from one whose lease ended because etcd was away (paused, emptied, restored): the living need time to find
out and to register again. Until one TTL after the contact is back, records that are missing are therefore still shown.
"""

import logging
from collections.abc import Callable

import msgspec

from stator.clock import Clock
from stator.discovery.interface import DiscoveryStatus

__all__ = ["EtcdContact"]

logger = logging.getLogger(__name__)


class EtcdContact:
    """Shared by the parts of one discovery."""

    def __init__(self, location: str, *, clock: Clock) -> None:
        self.status = DiscoveryStatus(backend="etcd", location=location)
        self.ttl = 0.0
        """seconds that the owners get"""
        self._clock = clock
        self._silent: dict[str, str] = {}
        self._patient_until = float("-inf")
        self._listeners: list[Callable[[], None]] = []

    @property
    def connected(self) -> bool:
        """Whether every part has an answer."""
        return not self._silent

    @property
    def patient_until(self) -> float:
        """Monotonic seconds until which a missing record says nothing about its owner; infinite while there is no contact."""
        return self._patient_until if self.connected else float("inf")

    def tell(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever `patient_until` has become finite or later."""
        self._listeners.append(listener)

    def lost(self, part: str, reason: str) -> None:
        """`part` got no answer."""
        first = self.connected
        self._silent[part] = reason
        if first:
            self.status = msgspec.structs.replace(self.status, stale_since=self._clock.wall(), reason=reason)
            logger.warning("etcd does not answer (%s); what is known of the cluster stays in use", reason)

    def found(self, part: str) -> None:
        """`part` got an answer."""
        if self._silent.pop(part, None) is None or self._silent:
            return
        away = self._clock.wall() - (self.status.stale_since or 0.0)
        self.status = msgspec.structs.replace(self.status, stale_since=None, reason="")
        logger.info("etcd answers again after %.1f s", away)
        self.be_patient()

    def be_patient(self) -> None:
        """The store is not what it was: give everybody a TTL to register again."""
        self._patient_until = self._clock.monotonic() + self.ttl
        for listener in self._listeners:
            listener()
