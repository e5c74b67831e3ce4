"""Which instances may be chosen now, and why not the others.

    discovered ─ barred, draining, busy ─▶ open ─ overloaded, inhibited, suspect ─▶ free ─ full ─▶ with room

Barred, draining and busy are facts: such an instance is not chosen. Suspicion (it is silent), inhibition (it failed) and overload (it
refused a request not long ago) are preferences: when no other instance is left, the suspects are used, then the one whose inhibition
ends first, so that a blip with a single worker is no outage (`design.md §5`), then the overloaded ones, oldest refusal first, so that
nothing is refused while a slot is free that somebody else gave back.

Choosing happens far more often than anything changes, so the answer is a tuple kept until a mark is set or runs out. What changes with
every request is not in it: whether the chosen one carries as many requests as it runs at once is looked at after choosing
(`Candidate.limit`), and only when it does the others are looked through (`with_room`).

Marks belong to the endpoint; what is barred and busy is so for those who share this object. `part` makes another one: models on one
endpoint have cards and thresholds of their own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from random import Random

import msgspec

from stator.errors import ConnectFailed, Overloaded, StatorError, Unavailable
from stator.protocol.ids import EndpointId
from stator.routing.candidate import Candidate
from stator.routing.config import RoutingConfig
from stator.routing.marks import MarkBoard
from stator.routing.policy import Policy
from stator.routing.request import ANYWHERE, RouteRequest
from stator.routing.shortage import Standing, State, shortage

__all__ = ["Availability", "AvailabilityRow"]

_ALWAYS_STALE = -math.inf
_NOBODY_BUSY: Mapping[int, str] = {}


class AvailabilityRow(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, explained. `until` is in the caller's monotonic seconds, None when only news ends the state."""

    instance_id: int
    state: State
    reason: str
    until: float | None
    chosen_from: bool
    """whether a request without wishes may go there now"""
    load: int
    limit: int | None


class Availability:
    """The view that callers have of the instances of their endpoint. Methods never block; `now` is monotonic seconds."""

    def __init__(self, endpoint: EndpointId, config: RoutingConfig | None = None, *, board: MarkBoard | None = None) -> None:
        """`board` is that of another view of the same endpoint (`part`)."""
        self._id = endpoint
        self._endpoint = "/".join(endpoint.segments)
        self._config = config or RoutingConfig()
        self._board = board if board is not None else MarkBoard(self._config)
        self._board.listen(self._changed)
        self._allowed: AbstractSet[int] | None = None
        self._barred_because = ""
        self._busy = _NOBODY_BUSY
        self._usable: tuple[Candidate, ...] = ()
        self._free: tuple[Candidate, ...] = ()
        self._suspects: tuple[Candidate, ...] = ()
        self._inhibited: list[Candidate] = []
        self._overloaded: list[Candidate] = []
        self._stale_at = _ALWAYS_STALE

    def part(self) -> "Availability":
        """A view of the same instances and marks, for callers to whom other instances are barred or busy."""
        return Availability(self._id, self._config, board=self._board)

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

    def choose(self, policy: Policy, now: float, request: RouteRequest, random: Random) -> Candidate:
        """Whom `policy` takes for `request`: nobody who is full, as long as others are not. A target decides for itself.

        Raises what `free` and `with_room` raise.
        """
        candidate = policy.choose(self.free(now, request), request, random)
        limit = candidate.limit
        if limit is None or candidate.load < limit or request.target is not None:
            return candidate
        return policy.choose(self.with_room(now, request), request, random)

    def with_room(self, now: float, request: RouteRequest = ANYWHERE) -> tuple[Candidate, ...]:
        """Those of `free` that carry fewer requests than they run at once; for whoever chose one that does not.

        When none of them has room, those that refused are asked, oldest refusal first; the silent and the failed are not, as long as
        others are well. Raises `Overloaded` when everybody is full. Costs a look at each instance.
        """
        if now >= self._stale_at:
            self._sort(now)
        excluded = request.excluded
        for group in self._groups(excluded):
            if left := tuple(each for each in group if each.has_room and each.instance_id not in excluded):
                return left
        raise self._nobody(now, excluded)

    def room(self, now: float) -> int | None:
        """How many more requests without wishes can be given away; None: any number."""
        if now >= self._stale_at:
            self._sort(now)
        room = 0
        for candidate in self._usable:
            limit = candidate.limit
            if limit is None:
                return None
            if candidate.load < limit:
                room += limit - candidate.load
        return room

    def pressure(self, now: float) -> str:
        """Why there is no room; "" if there is."""
        return "" if self.room(now) != 0 else self._nobody(now, frozenset()).message

    def knows(self, instance_id: int) -> bool:
        """Whether discovery has it."""
        return instance_id in self._board.candidates

    def __len__(self) -> int:
        return len(self._board.candidates)

    # -- news about the endpoint: the same for all parts

    def update(self, candidates: Sequence[Candidate]) -> None:
        """Follow discovery: these are all instances now. The order is kept."""
        self._board.update(candidates)

    def mark_inhibited(self, instance_id: int, now: float, reason: str = "") -> None:
        """It failed: avoid it for 5 s, doubling up to 60 s with each failure after that; a success starts over.

        Failures reported while it is inhibited are taken for the same one and change nothing.
        """
        self._board.inhibit(instance_id, now, reason)

    def mark_success(self, instance_id: int) -> None:
        """It answered: forget its failures and suspicion. Costs a look-up when there are none."""
        self._board.succeed(instance_id)

    def mark_overloaded(self, instance_id: int, now: float, *, seconds: float | None = None) -> None:
        """It refused at capacity: prefer others for `seconds` (default: the setting)."""
        self._board.overload(instance_id, now + (self._config.overloaded_for if seconds is None else seconds))

    def mark_room(self, instance_id: int) -> None:
        """A request there has ended: it may take another one. Costs a look-up when nothing is held against it."""
        self._board.overload(instance_id, 0.0)

    def mark_suspect(self, instance_id: int) -> None:
        """It is silent although it has requests; until `clear_suspect` or a success others are preferred."""
        self._board.suspect(instance_id, True)

    def clear_suspect(self, instance_id: int) -> None:
        """It was heard of again."""
        self._board.suspect(instance_id, False)

    def mark_draining(self, instance_id: int) -> None:
        """It finishes what it has and takes nothing new, until it leaves discovery."""
        self._board.drain(instance_id)

    def forget(self, instance_id: int) -> None:
        """It registered anew: drop all marks."""
        self._board.forget(instance_id)

    # -- news for those who share this object

    def set_busy(self, busy: Mapping[int, str]) -> bool:
        """Replace what the load monitor calls busy: id → reason, the nearest to be free first. Whether somebody is busy no longer.

        The mapping is kept: its keys must not change afterwards, its texts are asked for when somebody wants to read them.
        """
        before, now = self._busy.keys(), busy.keys()
        if before != now:
            self._changed()
        self._busy = busy
        return not before <= now

    def restrict_to(self, instance_ids: AbstractSet[int] | None, reason: str = "not among those to be used") -> None:
        """Bar all other instances; None bars nobody."""
        if instance_ids != self._allowed:
            self._allowed = instance_ids
            self._changed()
        self._barred_because = reason

    # -- explaining

    def explain(self, now: float) -> list[AvailabilityRow]:
        """Every discovered instance with its state, in discovery order."""
        self._sort(now)
        rows: list[AvailabilityRow] = []
        for instance_id, candidate in self._board.candidates.items():
            state, until = self._state_with_room(candidate, now)
            rows.append(
                AvailabilityRow(
                    instance_id=instance_id,
                    state=state,
                    reason=self._reason(state, candidate),
                    until=until,
                    chosen_from=candidate in self._usable and candidate.has_room,
                    load=candidate.load,
                    limit=candidate.limit,
                )
            )
        return rows

    def _reason(self, state: State, candidate: Candidate) -> str:
        match state:
            case "full":
                return f"{candidate.load} requests of {candidate.limit}"
            case "inhibited":
                return self._board.marks[candidate.instance_id].reason or "failed"
            case "suspect":
                return "silent with requests open"
            case "overloaded":
                return "refused at capacity"
            case "busy":
                return self._busy[candidate.instance_id]
            case "draining":
                return "takes nothing new"
            case "barred":
                return self._barred_because
            case "free":
                return ""

    # -- inside

    def _changed(self) -> None:
        self._stale_at = _ALWAYS_STALE

    def _state(self, instance_id: int, now: float) -> tuple[State, float | None]:
        """The hardest thing held against it, and until when."""
        if self._allowed is not None and instance_id not in self._allowed:
            return "barred", None
        marks = self._board.marks.get(instance_id)
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

    def _state_with_room(self, candidate: Candidate, now: float) -> tuple[State, float | None]:
        state, until = self._state(candidate.instance_id, now)
        return ("full", None) if state == "free" and not candidate.has_room else (state, until)

    def _sort(self, now: float) -> None:
        """Compute who may be chosen, and until when that holds."""
        free: list[Candidate] = []
        suspects: list[Candidate] = []
        inhibited: list[tuple[float, int, Candidate]] = []
        overloaded: list[tuple[float, int, Candidate]] = []
        stale_at = math.inf
        marks, busy, allowed = self._board.marks, self._busy, self._allowed
        for order, (instance_id, candidate) in enumerate(self._board.candidates.items()):
            if instance_id not in marks and instance_id not in busy and (allowed is None or instance_id in allowed):
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
        self._suspects = tuple(suspects)
        self._inhibited = [candidate for _, _, candidate in inhibited]
        self._overloaded = [candidate for _, _, candidate in overloaded]
        self._free = tuple(free)
        self._usable = tuple(free or suspects or self._inhibited[:1] or self._overloaded[:1])
        self._stale_at = stale_at

    def _groups(self, excluded: AbstractSet[int]) -> Iterator[Sequence[Candidate]]:
        """Whom to look at, in order of preference, when the free ones are not enough."""
        yield self._free
        if all(candidate.instance_id in excluded for candidate in self._free):
            yield self._suspects
            for candidate in self._inhibited:
                yield (candidate,)
        for candidate in self._overloaded:
            yield (candidate,)

    def _without(self, excluded: AbstractSet[int]) -> tuple[Candidate, ...]:
        """The best group that has an instance not yet tried."""
        for group in self._groups(excluded):
            if left := tuple(candidate for candidate in group if candidate.instance_id not in excluded):
                return left
        return ()

    def _target(self, instance_id: int, now: float, excluded: AbstractSet[int]) -> Candidate:
        candidate = self._board.candidates.get(instance_id)
        named = f"instance_id={instance_id} of endpoint {self._endpoint}"
        if candidate is None:
            raise ConnectFailed(f"instance_id={instance_id} not found for endpoint {self._endpoint}", instance=instance_id)
        if instance_id in excluded:
            raise Unavailable(f"{named} was already tried", instance=instance_id)
        state, _ = self._state(instance_id, now)
        if state in ("draining", "barred"):
            raise Unavailable(f"{named} cannot be used: {self._reason(state, candidate)}", instance=instance_id)
        if state == "busy":
            reason = self._busy[instance_id]
            raise Overloaded(f"{named} is busy ({reason}); retry after the next load report", instance=instance_id)
        return candidate

    def _nobody(self, now: float, excluded: AbstractSet[int]) -> StatorError:
        """The error when no candidate is left: `Overloaded` if capacity is what is missing, else `Unavailable`."""
        standings: list[Standing] = []
        for candidate in self._board.candidates.values():
            state, until = self._state_with_room(candidate, now)
            standings.append(Standing(candidate, state, until))
        return shortage(self._endpoint, standings, busy=self._busy, barred=self._barred_because, tried=excluded, now=now)
