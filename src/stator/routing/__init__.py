"""Which instance takes a request: candidates in, one out. Pure: no I/O, no clock, no tasks; `now` and randomness are handed in.

`Availability` says who may be chosen, a `Policy` chooses, `Occupancy` counts what is in flight, `RetryBudget` bounds retries.
`LoadTable` says who is busy: reports held against thresholds by a `LoadRule`, which alone knows what a load is.
"""

from stator.routing.availability import Availability, AvailabilityRow
from stator.routing.candidate import Candidate
from stator.routing.config import RoutingConfig
from stator.routing.device_weighted import DeviceWeighted
from stator.routing.direct import Direct
from stator.routing.least_loaded import LeastLoaded
from stator.routing.load_table import Group, LoadRow, LoadRule, LoadTable
from stator.routing.occupancy import Occupancy
from stator.routing.policy import BUILT_IN, Policy, normal_name, policy_name
from stator.routing.power_of_two import PowerOfTwo
from stator.routing.request import ANYWHERE, RouteRequest
from stator.routing.retry_budget import Attempts, RetryBudget
from stator.routing.round_robin import RoundRobin
from stator.routing.uniform import UniformRandom

__all__ = [
    "ANYWHERE",
    "BUILT_IN",
    "Attempts",
    "Availability",
    "AvailabilityRow",
    "Candidate",
    "DeviceWeighted",
    "Direct",
    "Group",
    "LeastLoaded",
    "LoadRow",
    "LoadRule",
    "LoadTable",
    "Occupancy",
    "Policy",
    "PowerOfTwo",
    "RetryBudget",
    "RoundRobin",
    "RouteRequest",
    "RoutingConfig",
    "UniformRandom",
    "normal_name",
    "policy_name",
]
