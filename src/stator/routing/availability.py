"""Which instances may be chosen now, and why not the others.

    discovered ─ draining, busy ─▶ open ─ overloaded, inhibited, suspect ─▶ free

Draining and busy are facts: such an instance is not chosen. Suspicion (it is silent), inhibition (it failed) and overload (it
refused a request not long ago) are preferences: when no other instance is left, the suspects are used, then the one whose inhibition
ends first, so that a blip with a single worker is no outage (`design.md §5`), then the overloaded ones, oldest refusal first, so that
nothing is refused while a slot is free that somebody else gave back.

Choosing happens far more often than anything changes, so the answer is a tuple kept until a mark is set or runs out.
"""

import math
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal

import msgspec

from stator.errors import ConnectFailed, Overloaded, StatorError, Unavailable
from stator.protocol.ids import EndpointId
from stator.routing.candidate import Candidate
from stator.routing.config import RoutingConfig
from stator.routing.request import ANYWHERE, RouteRequest

__all__ = ["Availability", "AvailabilityRow", "State"]

State = Literal["free", "inhibited", "suspect", "overloaded", "busy", "draining"]

_ALWAYS_STALE = -math.inf


class AvailabilityRow(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, explained. `until` is in the caller's monotonic seconds, None when only news ends the state."""

    instance_id: int
    state: State
    reason: str
    until: float | None
    chosen_from: bool
    """whether a request without wishes may go there now"""
    load: int


class _Marks:
    """What is held against one instance."""

    __slots__ = ("draining", "inhibited_until", "overloaded_until", "penalty", "reason", "suspect")

    def __init__(self) -> None:
        self.draining = False
        self.suspect = False
        self.overloaded_until = 0.0
        self.inhibited_until = 0.0
        self.penalty = 0.0
        """length of the last inhibition in seconds; 0 after a success"""
        self.reason = ""


class Availability:
    """The view one client has of the instances of its endpoint. Methods never block; `now` is monotonic seconds.

    Marks on instances that are not discovered are ignored; an instance that leaves discovery loses its marks.
    """

    def __init__(self, endpoint: EndpointId, config: RoutingConfig | None = None) -> None:
        self._endpoint = "/".join(endpoint.segments)
        self._config = config or RoutingConfig()
        self._candidates: dict[int, Candidate] = {}
        self._marks: dict[int, _Marks] = {}
        self._busy: AbstractSet[int] = frozenset()
        self._usable: tuple[Candidate, ...] = ()
        self._free: tuple[Candidate, ...] = ()
        self._suspects: list[Candidate] = []
        self._inhibited: list[Candidate] = []
        self._overloaded: list[Candidate] = []
        self._stale_at = _ALWAYS_STALE

    # -- choosing

    def free(self, now: float, request: RouteRequest = ANYWHERE) -> tuple[Candidate, ...]:
        """The candidates for `request`, never empty. A request with a target gets that one, even if it is inhibited, suspect or overloaded.

        Raises `Unavailable` when nobody is there or all were tried, `Overloaded` when capacity is what is missing, and
        `ConnectFailed` for a target that is not discovered.
        """
        if now >= self._stale_at:
            self._sort(now)
        if request.target is not None:
            return (self._target(request.target, now, request.excluded),)
        usable = self._without(request.excluded) if request.excluded else self._usable
        if not usable:
            raise self._nobody(now, request.excluded)
        return usable

    def knows(self, instance_id: int) -> bool:
        """Whether discovery has it."""
        return instance_id in self._candidates

    def __len__(self) -> int:
        return len(self._candidates)

    # -- news

    def update(self, candidates: Sequence[Candidate]) -> None:
        """Follow discovery: these are all instances now. The order is kept."""
        self._candidates = {candidate.instance_id: candidate for candidate in candidates}
        for instance_id in self._marks.keys() - self._candidates.keys():
            del self._marks[instance_id]
        self._stale_at = _ALWAYS_STALE

    def mark_inhibited(self, instance_id: int, now: float, reason: str = "") -> None:
        """It failed: avoid it for 5 s, doubling up to 60 s with each failure after that; a success starts over.

        Failures reported while it is inhibited are taken for the same one and change nothing.
        """
        marks = self._marks_of(instance_id)
        if marks is None or now < marks.inhibited_until:
            return
        marks.penalty = min(marks.penalty * 2 or self._config.inhibit_first, self._config.inhibit_most)
        marks.inhibited_until = now + marks.penalty
        marks.reason = reason

    def mark_success(self, instance_id: int) -> None:
        """It answered: forget its failures and suspicion. Costs a look-up when there are none."""
        marks = self._marks.get(instance_id)
        if marks is None or not (marks.penalty or marks.suspect):
            return
        marks.penalty = marks.inhibited_until = 0.0
        marks.suspect = False
        self._stale_at = _ALWAYS_STALE

    def mark_overloaded(self, instance_id: int, now: float, *, seconds: float | None = None) -> None:
        """It refused at capacity: prefer others for `seconds` (default: the setting)."""
        if (marks := self._marks_of(instance_id)) is not None:
            marks.overloaded_until = now + (self._config.overloaded_for if seconds is None else seconds)

    def mark_room(self, instance_id: int) -> None:
        """A request there has ended: it may take another one. Costs a look-up when nothing is held against it."""
        marks = self._marks.get(instance_id)
        if marks is not None and marks.overloaded_until:
            marks.overloaded_until = 0.0
            self._stale_at = _ALWAYS_STALE

    def mark_suspect(self, instance_id: int) -> None:
        """It is silent although it has requests; until `clear_suspect` or a success others are preferred."""
        if (marks := self._marks_of(instance_id)) is not None:
            marks.suspect = True

    def clear_suspect(self, instance_id: int) -> None:
        """It was heard of again."""
        marks = self._marks.get(instance_id)
        if marks is not None and marks.suspect:
            marks.suspect = False
            self._stale_at = _ALWAYS_STALE

    def mark_draining(self, instance_id: int) -> None:
        """It finishes what it has and takes nothing new, until it leaves discovery."""
        if (marks := self._marks_of(instance_id)) is not None:
            marks.draining = True

    def forget(self, instance_id: int) -> None:
        """It registered anew: drop all marks."""
        if self._marks.pop(instance_id, None) is not None:
            self._stale_at = _ALWAYS_STALE

    def set_busy(self, instance_ids: Iterable[int]) -> None:
        """Replace the set of instances that the load monitor calls busy."""
        self._busy = frozenset(instance_ids)
        self._stale_at = _ALWAYS_STALE

    # -- explaining

    def explain(self, now: float) -> list[AvailabilityRow]:
        """Every discovered instance with its state, in discovery order."""
        self._sort(now)
        rows: list[AvailabilityRow] = []
        for instance_id, candidate in self._candidates.items():
            state, until = self._state(instance_id, now)
            marks = self._marks.get(instance_id)
            rows.append(
                AvailabilityRow(
                    instance_id=instance_id,
                    state=state,
                    reason=self._reason(state, marks),
                    until=until,
                    chosen_from=candidate in self._usable,
                    load=candidate.load,
                )
            )
        return rows

    def _reason(self, state: State, marks: _Marks | None) -> str:
        match state:
            case "inhibited":
                return marks.reason or "failed" if marks is not None else ""
            case "suspect":
                return "silent with requests open"
            case "overloaded":
                return "refused at capacity"
            case "busy":
                return "load report"
            case "draining":
                return "takes nothing new"
            case _:
                return ""

    # -- inside

    def _marks_of(self, instance_id: int) -> _Marks | None:
        """The marks to change; None for an unknown instance."""
        if instance_id not in self._candidates:
            return None
        self._stale_at = _ALWAYS_STALE
        marks = self._marks.get(instance_id)
        if marks is None:
            marks = self._marks[instance_id] = _Marks()
        return marks

    def _state(self, instance_id: int, now: float) -> tuple[State, float | None]:
        """The hardest thing held against it, and until when."""
        marks = self._marks.get(instance_id)
        if marks is not None and marks.draining:
            return "draining", None
        if instance_id in self._busy:
            return "busy", None
        if marks is not None and now < marks.overloaded_until:
            return "overloaded", marks.overloaded_until
        if marks is not None and now < marks.inhibited_until:
            return "inhibited", marks.inhibited_until
        if marks is not None and marks.suspect:
            return "suspect", None
        return "free", None

    def _sort(self, now: float) -> None:
        """Compute who may be chosen, and until when that holds."""
        free: list[Candidate] = []
        suspects: list[Candidate] = []
        inhibited: list[tuple[float, int, Candidate]] = []
        overloaded: list[tuple[float, int, Candidate]] = []
        stale_at = math.inf
        marks, busy = self._marks, self._busy
        for order, (instance_id, candidate) in enumerate(self._candidates.items()):
            if instance_id not in marks and instance_id not in busy:
                free.append(candidate)
                continue
            state, until = self._state(instance_id, now)
            if until is not None and until < stale_at:
                stale_at = until
            if state == "free":
                free.append(candidate)
            elif state == "suspect":
                suspects.append(candidate)
            elif state == "inhibited" and until is not None:
                inhibited.append((until, order, candidate))
            elif state == "overloaded" and until is not None:
                overloaded.append((until, order, candidate))
        inhibited.sort()
        overloaded.sort()
        self._suspects = suspects
        self._inhibited = [candidate for _, _, candidate in inhibited]
        self._overloaded = [candidate for _, _, candidate in overloaded]
        self._free = tuple(free)
        self._usable = tuple(free or suspects or self._inhibited[:1] or self._overloaded[:1])
        self._stale_at = stale_at

    def _without(self, excluded: AbstractSet[int]) -> tuple[Candidate, ...]:
        """The best group that has an instance not yet tried."""
        for group in (self._free, self._suspects):
            if left := tuple(candidate for candidate in group if candidate.instance_id not in excluded):
                return left
        for candidate in (*self._inhibited, *self._overloaded):
            if candidate.instance_id not in excluded:
                return (candidate,)
        return ()

    def _target(self, instance_id: int, now: float, excluded: AbstractSet[int]) -> Candidate:
        candidate = self._candidates.get(instance_id)
        if candidate is None:
            raise ConnectFailed(f"instance_id={instance_id} not found for endpoint {self._endpoint}", instance=instance_id)
        if instance_id in excluded:
            raise Unavailable(f"instance_id={instance_id} of endpoint {self._endpoint} was already tried", instance=instance_id)
        state, until = self._state(instance_id, now)
        if state == "draining":
            raise Unavailable(f"instance_id={instance_id} of endpoint {self._endpoint} is draining", instance=instance_id)
        if state == "busy":
            wait = _wait_text(until, now)
            raise Overloaded(f"instance_id={instance_id} of endpoint {self._endpoint} is busy; {wait}", instance=instance_id)
        return candidate

    def _nobody(self, now: float, excluded: AbstractSet[int]) -> StatorError:
        """The error when no candidate is left: `Overloaded` if capacity is what is missing, else `Unavailable`."""
        text = f"no workers available for endpoint {self._endpoint}"
        if not self._candidates:
            return Unavailable(text)
        states = {instance_id: self._state(instance_id, now) for instance_id in self._candidates}
        full = [until for state, until in states.values() if state in ("overloaded", "busy")]
        draining = sum(state == "draining" for state, _ in states.values())
        if full:
            first = None if None in full else min(until for until in full if until is not None)
            others = len(states) - len(full)
            beside = f" ({others} others draining or already tried)" if others else ""
            return Overloaded(
                f"{len(full)} of {len(states)} workers of endpoint {self._endpoint} are busy{beside}; {_wait_text(first, now)}"
            )
        tried = sum(instance_id in excluded for instance_id in states)
        return Unavailable(f"{text}: of {len(states)} known, {draining} are draining and {tried} were tried")


def _wait_text(until: float | None, now: float) -> str:
    return "retry after the next load report" if until is None else f"retry in {max(0.0, until - now):.1f} s"
