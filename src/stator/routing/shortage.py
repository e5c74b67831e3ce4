"""What callers are told when no instance can take a request: what is missing, and by how much."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, NamedTuple

from stator.errors import Overloaded, StatorError, Unavailable
from stator.routing.candidate import Candidate

__all__ = ["Standing", "State", "shortage"]

State = Literal["free", "full", "inhibited", "suspect", "overloaded", "busy", "draining", "barred"]
_WITHOUT_CAPACITY = ("busy", "full", "overloaded")


class Standing(NamedTuple):
    """How one instance stands, and until when; None: until there is news."""

    candidate: Candidate
    state: State
    until: float | None


def shortage(
    endpoint: str,
    standings: Sequence[Standing],
    *,
    busy: Mapping[int, str],
    barred: str,
    tried: AbstractSet[int],
    now: float,
) -> StatorError:
    """`Overloaded` if capacity is what is missing, with the limit and value of the instance nearest to having some; else `Unavailable`.

    `busy` has the reasons, the nearest first; `barred` is why instances are.
    """
    nobody = f"no workers available for endpoint {endpoint}"
    ours = [standing for standing in standings if standing.state != "barred"]
    if not ours:
        return Unavailable(f"{nobody}: {len(standings)} may not be used ({barred})" if standings else nobody)
    full = [standing for standing in ours if standing.state in _WITHOUT_CAPACITY]
    if not full:
        draining = sum(standing.state == "draining" for standing in ours)
        refused = sum(standing.candidate.instance_id in tried for standing in ours)
        return Unavailable(f"{nobody}: of {len(ours)} known, {draining} are draining and {refused} were tried")
    others = len(ours) - len(full)
    beside = f" ({others} more draining, failed, silent or already tried)" if others else ""
    return Overloaded(
        f"{len(full)} of {len(ours)} workers of endpoint {endpoint} are busy{beside}: {_causes(full, busy)}; {_wait(full, now)}"
    )


def _causes(full: Sequence[Standing], busy: Mapping[int, str]) -> str:
    """Each kind of cause with the number of workers and the one nearest to room."""
    parts: list[str] = []
    reported = {standing.candidate.instance_id for standing in full if standing.state == "busy"}
    if reported:
        nearest = next(instance for instance in busy if instance in reported)
        parts.append(f"{len(reported)} over a limit, nearest instance {nearest:x}: {busy[nearest]}")
    carrying = [standing.candidate for standing in full if standing.state == "full"]
    if carrying:
        least = min(carrying, key=lambda candidate: candidate.load - (candidate.limit or 0))
        parts.append(
            f"{len(carrying)} with all requests they run at once, {least.load} of {least.limit} on {least.instance_id:x}"
        )
    refused = len(full) - len(reported) - len(carrying)
    if refused:
        parts.append(f"{refused} refused at capacity")
    return "; ".join(parts)


def _wait(full: Sequence[Standing], now: float) -> str:
    """When it is worth while to come again."""
    states = {standing.state for standing in full}
    if "full" in states:
        return "retry when a request has ended"
    if "busy" in states:
        return "retry after the next load report"
    return f"retry in {max(0.0, min(each.until for each in full if each.until is not None) - now):.1f} s"
