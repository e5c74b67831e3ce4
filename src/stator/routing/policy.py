"""What a routing policy is, and how a policy is called by name."""

import difflib
from collections.abc import Iterable, Sequence
from random import Random
from typing import Protocol

from stator.errors import UsageError
from stator.routing.candidate import Candidate
from stator.routing.request import RouteRequest

__all__ = ["BUILT_IN", "Policy", "normal_name", "policy_name"]


class Policy(Protocol):
    """Candidates and request facts in, one candidate out. It neither waits nor looks at a clock; randomness is handed in.

    `free` is never empty, holds no excluded instance, and keeps its order while the instances stay the same. One object serves
    one client and may remember its own choices.
    """

    @property
    def name(self) -> str:
        """The name under which it is registered in the group `stator.routing`."""
        ...

    @property
    def needs_load(self) -> bool:
        """Whether it reads `Candidate.load`; then the client counts what is in flight (`Occupancy`)."""
        ...

    def choose(self, free: Sequence[Candidate], request: RouteRequest, random: Random) -> Candidate:
        """One of `free`."""
        ...


BUILT_IN = ("round_robin", "random", "direct", "least_loaded", "power_of_two", "device_weighted")

# The reference's spellings (spec/20 §7): snake case in configuration, dashes in flags.
_ALIASES = {
    "power_of_two_choices": "power_of_two",
    "p2c": "power_of_two",
    "device_aware_weighted": "device_weighted",
    "device_aware": "device_weighted",
    "uniform": "random",
    "k_v": "kv",
}


def normal_name(text: str) -> str:
    """`text` in our spelling, known or not: `Power-Of-Two-Choices` is `power_of_two`."""
    name = text.strip().lower().replace("-", "_")
    return _ALIASES.get(name, name)


def policy_name(text: str, known: Iterable[str] = BUILT_IN) -> str:
    """The registered name that `text` means; `UsageError` with the nearest one if `known` has none."""
    name = normal_name(text)
    names = sorted(known)
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise UsageError(f"no routing policy is called {text!r}{hint}; there are: {', '.join(names)}")
