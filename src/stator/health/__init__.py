"""Is this process well, and why not: status of process and endpoints, and the canary (`spec/25 §4–6`).

The HTTP server that tells it is `stator.health.server`, which is only loaded where it is switched on.
"""

from stator.health.canary import Canary, Probe, canary_outcomes, item_problem
from stator.health.config import HealthConfig
from stator.health.engine_routes import EngineRoutes
from stator.health.status import Activity, EndpointChange, EndpointState, Explanation, Obstacle, SystemHealth, Target

__all__ = [
    "Activity",
    "Canary",
    "EndpointChange",
    "EndpointState",
    "EngineRoutes",
    "Explanation",
    "HealthConfig",
    "Obstacle",
    "Probe",
    "SystemHealth",
    "Target",
    "canary_outcomes",
    "item_problem",
]
