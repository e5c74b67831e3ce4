"""Settings that every event plane takes; each plane has some of its own beside them."""

from typing import Annotated, ClassVar

from stator.config import Config, Setting

__all__ = ["EventsConfig"]


class EventsConfig(Config, frozen=True, kw_only=True):
    """How much may wait, and how large a message may be, on any event plane."""

    section: ClassVar[str] = "events"

    queue_capacity: Annotated[
        int,
        Setting(
            doc="messages that may wait for the reader of a subscription; what it drops then is the subscriber's choice",
            ge=1,
            dyn="DYN_ZMQ_EVENT_SUBSCRIBER_CHANNEL_CAPACITY",
        ),
    ] = 100_000
    queue_bytes: Annotated[
        int,
        Setting(doc="payload that may wait for the reader of a subscription; one message may always wait", unit="bytes", ge=1),
    ] = 256 * 2**20
    max_payload: Annotated[
        int,
        Setting(doc="largest payload of a message; larger ones are neither sent nor taken", unit="bytes", ge=1024, le=2**31),
    ] = 16 * 2**20
