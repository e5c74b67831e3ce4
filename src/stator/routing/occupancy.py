"""How many requests are in flight at each instance: one table per endpoint and process."""

from collections.abc import Callable, Mapping

from stator.routing.candidate import Candidate

__all__ = ["Occupancy"]


class Occupancy:
    """Makes the candidates of one endpoint and counts what they carry. Shared by all clients of the endpoint in the process.

    Each `acquire` is paired with one `release` of the same object. An instance that left discovery is dropped with its count;
    requests it still carries give back to the dropped object, so that a later instance of the same id starts at nought.
    """

    def __init__(self) -> None:
        self._candidates: dict[int, Candidate] = {}
        self.on_room: Callable[[], None] | None = None
        """called when a request ended at an instance that takes a limited number"""

    def update(self, instances: Mapping[int, str]) -> tuple[Candidate, ...]:
        """Follow discovery: `instances` is id → device type of all instances now. Their candidates, in that order."""
        known = self._candidates
        fresh: dict[int, Candidate] = {}
        for instance_id, device_type in instances.items():
            candidate = known.get(instance_id)
            if candidate is None:
                candidate = Candidate(instance_id=instance_id)
            candidate.device_type = device_type
            fresh[instance_id] = candidate
        self._candidates = fresh
        return tuple(fresh.values())

    def acquire(self, candidate: Candidate) -> None:
        """A request was given to it."""
        candidate.load += 1

    def release(self, candidate: Candidate) -> None:
        """That request ended, in whatever way."""
        if candidate.load > 0:
            candidate.load -= 1
            if self.on_room is not None and candidate.limit is not None:
                self.on_room()

    def load(self, instance_id: int) -> int:
        """Requests in flight; 0 for an unknown instance."""
        candidate = self._candidates.get(instance_id)
        return 0 if candidate is None else candidate.load

    @property
    def total(self) -> int:
        """Requests in flight at the instances now in discovery."""
        return sum(candidate.load for candidate in self._candidates.values())
