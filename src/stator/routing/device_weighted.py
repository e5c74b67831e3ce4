"""Device aware: CPU instances get their share beside faster ones."""

from collections.abc import Sequence
from random import Random

from stator.errors import UsageError
from stator.routing.candidate import Candidate
from stator.routing.least_loaded import least_loaded
from stator.routing.request import RouteRequest

__all__ = ["DeviceWeighted"]


class DeviceWeighted:
    """Choose the class of device, then the least loaded of the class (`spec/20 §7`).

    An instance that is not on CPU counts `ratio` times one that is (reference: `DYN_ENCODER_CUDA_TO_CPU_RATIO`). CPU is chosen
    while the load of all CPU instances is below `load_of_others * cpus // (ratio * others)`.
    """

    __slots__ = ("_ratio",)

    name = "device_weighted"
    needs_load = True

    def __init__(self, *, ratio: int = 8) -> None:
        if ratio < 1:
            raise UsageError(f"ratio = {ratio}: an accelerator counts for at least one CPU")
        self._ratio = ratio

    def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
        cpus: list[Candidate] = []
        others: list[Candidate] = []
        cpu_load = other_load = 0
        for candidate in free:
            if candidate.device_type == "cpu":
                cpus.append(candidate)
                cpu_load += candidate.load
            else:
                others.append(candidate)
                other_load += candidate.load
        if cpus and others:
            allowed = other_load * len(cpus) // (self._ratio * len(others))
            return least_loaded(cpus if cpu_load < allowed else others, random)
        return least_loaded(cpus or others, random)
