"""The event plane: publish and subscribe by topic, over ZMQ, NATS or inside one process. One interface (`EventPlane`) for all."""

from stator.events.config import EventsConfig
from stator.events.host import EventHost, EventPlaneFactory
from stator.events.interface import (
    Channel,
    Event,
    EventPlane,
    EventPublisher,
    Gap,
    OnGap,
    Overflow,
    PublisherStatistics,
    Subscription,
    SubscriptionStatistics,
)
from stator.events.memory import MemoryBus, MemoryEvents, MemoryEventsConfig

__all__ = [
    "Channel",
    "Event",
    "EventHost",
    "EventPlane",
    "EventPlaneFactory",
    "EventPublisher",
    "EventsConfig",
    "Gap",
    "MemoryBus",
    "MemoryEvents",
    "MemoryEventsConfig",
    "OnGap",
    "Overflow",
    "PublisherStatistics",
    "Subscription",
    "SubscriptionStatistics",
]
