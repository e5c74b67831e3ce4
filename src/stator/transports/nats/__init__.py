"""The compatible plane over NATS (`spec/10 §6`): requests travel by subject, answers call home over TCP."""

from stator.transports.nats.config import NatsConfig
from stator.transports.nats.plane import NatsPlane

__all__ = ["NatsConfig", "NatsPlane"]
