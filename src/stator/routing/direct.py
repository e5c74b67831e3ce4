"""Direct: the caller names the instance."""

from collections.abc import Sequence
from random import Random

from stator.errors import ConnectFailed, UsageError
from stator.routing.candidate import Candidate
from stator.routing.request import RouteRequest

__all__ = ["Direct"]


class Direct:
    """The instance `RouteRequest.target`, and never another one."""

    __slots__ = ()

    name = "direct"
    needs_load = False

    def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
        """`UsageError` without a target; `ConnectFailed` if it is not in `free`."""
        target = request.target
        if target is None:
            raise UsageError("the policy 'direct' needs the id of an instance: call direct(request, instance_id)")
        for candidate in free:
            if candidate.instance_id == target:
                return candidate
        raise ConnectFailed(f"instance_id={target} not found", instance=target)
