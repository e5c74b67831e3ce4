"""What is held against the instances of one endpoint: they failed, refused, are silent, or are leaving."""

from collections.abc import Callable, Sequence
from weakref import WeakMethod

from stator.routing.candidate import Candidate
from stator.routing.config import RoutingConfig

__all__ = ["MarkBoard", "Marks"]


class Marks:
    """What is held against one instance. Times are monotonic seconds."""

    __slots__ = ("draining", "inhibited_until", "overloaded_until", "penalty", "reason", "suspect")

    def __init__(self) -> None:
        self.draining = False
        self.suspect = False
        self.overloaded_until = 0.0
        self.inhibited_until = 0.0
        self.penalty = 0.0
        """length of the last inhibition in seconds; 0 after a success"""
        self.reason = ""


class MarkBoard:
    """The instances of an endpoint with their marks, common to all who choose among them; whoever `listen`s is told of changes.

    Marks on instances that are not discovered are ignored; an instance that leaves discovery loses its marks.
    """

    def __init__(self, config: RoutingConfig) -> None:
        self.candidates: dict[int, Candidate] = {}
        self.marks: dict[int, Marks] = {}
        self._config = config
        self._listeners: list[WeakMethod[Callable[[], None]]] = []

    def listen(self, changed: Callable[[], None]) -> None:
        """Call the bound method `changed` with every change, as long as its object lives."""
        self._listeners = [each for each in self._listeners if each() is not None]
        self._listeners.append(WeakMethod(changed))

    def update(self, candidates: Sequence[Candidate]) -> None:
        """These are all instances now, in this order."""
        self.candidates = {candidate.instance_id: candidate for candidate in candidates}
        for instance_id in self.marks.keys() - self.candidates.keys():
            del self.marks[instance_id]
        self._changed()

    def inhibit(self, instance_id: int, now: float, reason: str) -> None:
        """It failed. Failures reported while it is inhibited are taken for the same one and change nothing."""
        marks = self._of(instance_id)
        if marks is None or now < marks.inhibited_until:
            return
        marks.penalty = min(marks.penalty * 2 or self._config.inhibit_first, self._config.inhibit_most)
        marks.inhibited_until = now + marks.penalty
        marks.reason = reason
        self._changed()

    def succeed(self, instance_id: int) -> None:
        """It answered."""
        marks = self.marks.get(instance_id)
        if marks is None or not (marks.penalty or marks.suspect):
            return
        marks.penalty = marks.inhibited_until = 0.0
        marks.suspect = False
        self._changed()

    def overload(self, instance_id: int, until: float) -> None:
        """It refused at capacity; 0: it has room again."""
        marks = self._of(instance_id) if until else self.marks.get(instance_id)
        if marks is not None and marks.overloaded_until != until:
            marks.overloaded_until = until
            self._changed()

    def suspect(self, instance_id: int, is_suspect: bool) -> None:
        """It is silent, or was heard of again."""
        marks = self._of(instance_id) if is_suspect else self.marks.get(instance_id)
        if marks is not None and marks.suspect != is_suspect:
            marks.suspect = is_suspect
            self._changed()

    def drain(self, instance_id: int) -> None:
        """It is leaving."""
        if (marks := self._of(instance_id)) is not None:
            marks.draining = True
            self._changed()

    def forget(self, instance_id: int) -> None:
        """It registered anew."""
        if self.marks.pop(instance_id, None) is not None:
            self._changed()

    def _of(self, instance_id: int) -> Marks | None:
        """The marks to change; None for an unknown instance."""
        if instance_id not in self.candidates:
            return None
        marks = self.marks.get(instance_id)
        if marks is None:
            marks = self.marks[instance_id] = Marks()
        return marks

    def _changed(self) -> None:
        for each in self._listeners:
            if (changed := each()) is not None:
                changed()
