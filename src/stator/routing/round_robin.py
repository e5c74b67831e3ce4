"""Round robin: each free instance in turn."""

from collections.abc import Sequence
from random import Random

from stator.routing.candidate import Candidate
from stator.routing.request import RouteRequest

__all__ = ["RoundRobin"]


class RoundRobin:
    """`free[n mod len(free)]` with a counter that also moves when the request then fails (`spec/20 §7`)."""

    __slots__ = ("_turn",)

    name = "round_robin"
    needs_load = False

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
        turn = self._turn
        self._turn = turn + 1
        return free[turn % len(free)]
