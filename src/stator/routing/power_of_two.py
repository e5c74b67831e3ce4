"""Power of two choices: the less loaded of two instances picked at random."""

from collections.abc import Sequence
from random import Random

from stator.routing.candidate import Candidate
from stator.routing.request import RouteRequest

__all__ = ["PowerOfTwo"]


class PowerOfTwo:
    """Two different instances at random; the smaller load wins, the first one if they are equal (`spec/20 §7`).

    Nearly as even as `least_loaded`, at the same cost for any number of instances, and many clients that know only their own
    requests do not all run to the same one.
    """

    __slots__ = ()

    name = "power_of_two"
    needs_load = True

    def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
        count = len(free)
        if count == 1:
            return free[0]
        first = int(random.random() * count)
        second = int(random.random() * (count - 1))
        if second >= first:
            second += 1
        a, b = free[first], free[second]
        return b if b.load < a.load else a
