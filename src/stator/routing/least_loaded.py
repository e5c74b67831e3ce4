"""Least loaded: the instance with the fewest requests in flight."""

from collections.abc import Sequence
from random import Random

from stator.routing.candidate import Candidate
from stator.routing.request import RouteRequest

__all__ = ["LeastLoaded", "least_loaded"]


class LeastLoaded:
    """The exact minimum of `load`, ties broken uniformly at random (`spec/20 §7`)."""

    __slots__ = ()

    name = "least_loaded"
    needs_load = True

    def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
        return least_loaded(free, random)


def least_loaded(candidates: Sequence[Candidate], random: Random) -> Candidate:
    """One of those with the smallest load, each with the same probability. `candidates` is not empty."""
    least: list[Candidate] = []
    lowest = candidates[0].load
    for candidate in candidates:
        load = candidate.load
        if load == lowest:
            least.append(candidate)
        elif load < lowest:
            lowest = load
            least = [candidate]
    return least[0] if len(least) == 1 else least[int(random.random() * len(least))]
