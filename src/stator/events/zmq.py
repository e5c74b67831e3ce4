"""Events over ZMQ, with the reference's frames (`spec/40 §1.4`).

Direct: every publisher listens on a port of its own and says so in discovery; subscribers connect to those of their channel as records
come and go, and believe messages of these publishers alone. With brokers: publishers and subscribers connect to them, no record is
written, and a message says nothing of its scope: the same topic of another namespace arrives too.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from stator.errors import ConnectFailed
from stator.events.channel_plane import ChannelPlane
from stator.events.host import EventHost
from stator.events.interface import Channel, Event, OnGap, Overflow
from stator.events.publisher import ChannelPublisher
from stator.events.subscription import ChannelSubscription
from stator.events.zmq_config import ZmqEventsConfig
from stator.events.zmq_subscription import BrokerSubscription, DirectSubscription
from stator.protocol.event_frame import encode_frames
from stator.protocol.records import EventTransport
from stator.tasks import Scope

if TYPE_CHECKING:
    from stator.events.zmq_sockets import Outlet, Sockets

__all__ = ["ZmqEvents", "ZmqEventsConfig"]


class ZmqEvents(ChannelPlane):
    """`stator.events.EventPlane` over ZMQ. The library is loaded, and its one I/O thread started, at first use."""

    def __init__(self, config: ZmqEventsConfig, *, host: EventHost) -> None:
        super().__init__(host)
        self._config = config
        self._brokers = config.brokers
        self._scope = Scope("zmq events")
        self._sockets: Sockets | None = None

    async def _open_publisher(self, channel: Channel) -> "_ZmqPublisher":
        sockets, brokers = await self._ready(), self._brokers
        publisher = _ZmqPublisher(channel, self._host, sockets.outlet(), forget=self._parts.discard)
        try:
            if brokers is None:
                await publisher.listen()
            else:
                publisher.connect(brokers.xsub)
        except BaseException:
            await publisher.aclose()
            raise
        return publisher

    async def _open_subscription(
        self, channel: Channel, *, capacity: int | None, overflow: Overflow, on_gap: OnGap | None
    ) -> ChannelSubscription:
        sockets = await self._ready()
        options: dict[str, Any] = {
            "capacity": capacity,
            "overflow": overflow,
            "on_gap": on_gap,
            "forget": self._parts.discard,
        }
        subscription: BrokerSubscription | DirectSubscription
        if self._brokers is None:
            subscription = DirectSubscription(sockets, channel, self._host, self._scope, **options)
        else:
            subscription = BrokerSubscription(sockets, channel, self._host, self._brokers.xpub, **options)
        try:
            await subscription.start()
        except BaseException:
            await subscription.aclose()
            raise
        return subscription

    async def _ready(self) -> "Sockets":
        if self._sockets is None:
            make = await asyncio.to_thread(_load)
            self._sockets = make(self._config, max_envelope=self._host.max_envelope)
        return self._sockets

    async def _close(self) -> None:
        await self._scope.aclose()
        if self._sockets is not None:
            await self._sockets.aclose()


class _ZmqPublisher(ChannelPublisher):
    """One PUB socket."""

    def __init__(
        self, channel: Channel, host: EventHost, outlet: "Outlet", *, forget: Callable[[ChannelPublisher], object]
    ) -> None:
        super().__init__(channel, host, forget=forget)
        self._frame = channel.topic.encode()
        self._outlet = outlet

    async def listen(self) -> None:
        """Be there for subscribers, and say so in discovery."""
        host = self._host
        port = self._outlet.bind(_bracketed(await _address(host.bind_host)))
        endpoint = f"tcp://{_bracketed(host.advertise_host)}:{port}"
        await self.announce(EventTransport(kind="Zmq", config={"endpoint": endpoint}))

    def connect(self, brokers: tuple[str, ...]) -> None:
        """Send to brokers."""
        for endpoint in brokers:
            self._outlet.connect(endpoint)

    def _send(self, event: Event) -> bool:
        return self._outlet.send(encode_frames(event, self._frame))

    async def _close(self) -> None:
        self._outlet.close()


def _load() -> "type[Sockets]":
    """Reads the disk, not for the event loop."""
    from stator.events.zmq_sockets import Sockets

    return Sockets


def _bracketed(host: str) -> str:
    """`host` as it stands before a port."""
    return f"[{host}]" if ":" in host else host


async def _address(host: str) -> str:
    """The address that `host` names; ZMQ binds to nothing else."""
    if host in ("", "*"):
        return "0.0.0.0"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConnectFailed(f"event publisher cannot listen on {host!r}: {error}", phase="connect") from error
    return str(found[0][4][0])
