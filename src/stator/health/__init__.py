"""Is this process well, and why not: status of process and endpoints, the canary, the status HTTP server (`spec/25 §4–6`)."""

from stator.health.canary import Canary, Probe, item_problem
from stator.health.config import HealthConfig
from stator.health.engine_routes import EngineRoutes
from stator.health.server import StatusServer
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
    "StatusServer",
    "SystemHealth",
    "Target",
    "item_problem",
]
