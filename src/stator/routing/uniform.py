"""Random: any free instance with the same probability. Registered as `random`."""

from collections.abc import Sequence
from random import Random

from stator.routing.candidate import Candidate
from stator.routing.request import RouteRequest

__all__ = ["UniformRandom"]


class UniformRandom:
    """A uniform index (`spec/20 §7`)."""

    __slots__ = ()

    name = "random"
    needs_load = False

    def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
        # random() < 1 always; a third of the time of randrange, and the bias for n instances is n / 2**53.
        return free[int(random.random() * len(free))]
