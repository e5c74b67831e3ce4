"""Settings of the ZMQ event plane."""

import re
from typing import Annotated, ClassVar

import msgspec

from stator.config import Config, Setting
from stator.errors import ConfigError

__all__ = ["Brokers", "ZmqEventsConfig"]

_ENDPOINT = re.compile(r"tcp://[^\s;,/]+:[0-9]{1,5}")


class Brokers(msgspec.Struct, frozen=True, kw_only=True):
    """Where publishers and where subscribers connect to; every message goes to all of them."""

    xsub: tuple[str, ...]
    xpub: tuple[str, ...]


class ZmqEventsConfig(Config, frozen=True, kw_only=True):
    """With or without brokers, and how many messages may wait for a slow or absent peer."""

    section: ClassVar[str] = "zmq"

    broker: Annotated[
        str,
        Setting(
            doc="brokers, as `xsub=tcp://host:port[;…], xpub=tcp://host:port[;…]`; empty: publishers are found through discovery",
            dyn="DYN_ZMQ_BROKER_URL",
        ),
    ] = ""
    send_queue: Annotated[
        int, Setting(doc="messages that wait in a publisher for each slow subscriber, or for an absent broker", ge=1)
    ] = 32_768
    receive_queue: Annotated[
        int, Setting(doc="messages that wait per publisher until this process' event loop takes them", ge=1)
    ] = 32_768
    reconnect_first: Annotated[float, Setting(doc="time before the first try to connect again", unit="s", ge=0.001)] = 0.1
    reconnect_most: Annotated[float, Setting(doc="longest time between tries", unit="s", ge=0.001)] = 2.0

    def check(self) -> None:
        if self.reconnect_most < self.reconnect_first:
            raise ConfigError(
                f"zmq.reconnect_most = {self.reconnect_most} is below zmq.reconnect_first = {self.reconnect_first}"
            )
        _ = self.brokers

    @property
    def brokers(self) -> Brokers | None:
        """`broker`, taken apart; None without."""
        if not self.broker.strip():
            return None
        found: dict[str, tuple[str, ...]] = {}
        for part in self.broker.split(","):
            name, _, endpoints = part.partition("=")
            found[name.strip()] = tuple(each.strip() for each in endpoints.split(";") if each.strip())
        endpoints = [each for some in found.values() for each in some]
        if found.keys() != {"xsub", "xpub"} or not all(found.values()) or not all(map(_ENDPOINT.fullmatch, endpoints)):
            raise ConfigError(
                f"zmq.broker = {self.broker!r} (DYN_ZMQ_BROKER_URL): expected xsub=tcp://host:port[;…], xpub=tcp://host:port[;…]"
            )
        return Brokers(**found)
