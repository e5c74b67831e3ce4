"""ZMQ sockets on an event loop, without threads of ours and without a task per message. The only module that imports `zmq`.

A socket's descriptor is no stream of bytes: it becomes readable once when *something* happens to the socket, and any call on the
socket may take that news away. So it is only a hint to look, every look goes on until nothing is left, and every other call on a
socket that is read is followed by a look.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from stator.errors import ConnectFailed
from stator.events.zmq_config import ZmqEventsConfig
from stator.protocol.event_frame import FRAMES, HEADER_SIZE

__all__ = ["Inlet", "Outlet", "Sockets"]

logger = logging.getLogger(__name__)

# Plain numbers: combining the members of an enumeration costs more than sending.
_NOWAIT = int(zmq.DONTWAIT)
_MORE = int(zmq.SNDMORE | zmq.DONTWAIT)
_RCVMORE = int(zmq.RCVMORE)
_MAX_SOCKETS = 8192
_AT_ONCE = 256
"""messages taken before others on the loop get a turn"""
_AT_MOST = 10_000
"""messages taken before a publisher that left is disconnected"""
_SLACK = 8
"""times the largest message a frame may be before it is not even received. ZMQ then ends the connection for good, which is too much
for a message that is a little too large: that is read, counted and dropped"""
_SUBSCRIPTION_SIZE = 65_536
"""bytes; what subscribers send to publishers is a topic"""


class Sockets:
    """One ZMQ context: its sockets and its I/O thread."""

    def __init__(self, config: ZmqEventsConfig, *, max_envelope: int) -> None:
        self._config = config
        self._max_frame = _SLACK * max_envelope + HEADER_SIZE
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._context.set(zmq.MAX_SOCKETS, _MAX_SOCKETS)

    def outlet(self) -> "Outlet":
        """A new PUB socket."""
        socket = self._make(zmq.PUB)
        socket.set(zmq.SNDHWM, self._config.send_queue)
        socket.set(zmq.MAXMSGSIZE, _SUBSCRIPTION_SIZE)
        return Outlet(socket)

    def inlet(self, topic: bytes, deliver: Callable[[list[bytes]], object]) -> "Inlet":
        """A new SUB socket for topics that begin with `topic`."""
        socket = self._make(zmq.SUB)
        socket.set(zmq.RCVHWM, self._config.receive_queue)
        socket.set(zmq.MAXMSGSIZE, self._max_frame)
        socket.set(zmq.SUBSCRIBE, topic)
        return Inlet(socket, asyncio.get_running_loop(), deliver)

    def _make(self, kind: int) -> "zmq.Socket[bytes]":
        try:
            socket = self._context.socket(kind)
        except zmq.ZMQError as error:
            raise ConnectFailed(f"no more sockets for events: {error.strerror}", phase="connect") from error
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RECONNECT_IVL, int(self._config.reconnect_first * 1000))
        socket.set(zmq.RECONNECT_IVL_MAX, int(self._config.reconnect_most * 1000))
        socket.set(zmq.TCP_KEEPALIVE, 1)  # a peer whose machine is gone says nothing; 30 s until that is noticed
        socket.set(zmq.TCP_KEEPALIVE_IDLE, 15)
        socket.set(zmq.TCP_KEEPALIVE_INTVL, 5)
        socket.set(zmq.TCP_KEEPALIVE_CNT, 3)
        return socket

    async def aclose(self) -> None:
        """End the I/O thread; nothing may be used any more. Cancelled: it goes on by itself."""
        await asyncio.shield(asyncio.to_thread(self._context.destroy, 0))


class Outlet:
    """A PUB socket. A peer that does not keep up misses messages; nobody waits for it."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._send: Any = socket.send

    def bind(self, host: str) -> int:
        """Listen on any free port of `host`, an address (of version 6 in brackets); the port. Raises `ConnectFailed`."""
        self._socket.set(zmq.IPV6, int("[" in host))
        try:
            self._socket.bind(f"tcp://{host}:0")
        except zmq.ZMQError as error:
            raise ConnectFailed(f"event publisher cannot listen on {host}: {error.strerror}", phase="connect") from error
        endpoint = self._socket.get(zmq.LAST_ENDPOINT)
        return int(bytes(endpoint).rstrip(b"\0").rpartition(b":")[2])

    def connect(self, endpoint: str) -> None:
        """Send to a broker too, whenever it is there. Raises `ConnectFailed` for an endpoint that makes no sense."""
        _connect(self._socket, endpoint)

    def send(self, frames: tuple[bytes, bytes, bytes, bytes]) -> bool:
        """Hand a message to the socket; False: it took none. Never waits."""
        send = self._send
        topic, publisher, sequence, body = frames
        try:
            send(topic, _MORE)
            send(publisher, _MORE)
            send(sequence, _MORE)
            send(body, _NOWAIT)
        except zmq.ZMQError:
            return False
        return True

    def close(self) -> None:
        """At once; what has not left is lost. Idempotent."""
        self._socket.close(0)


class Inlet:
    """A SUB socket that is read on the event loop: each message goes to `deliver`, as its frames, at most one more than a message has."""

    def __init__(
        self, socket: "zmq.Socket[bytes]", loop: asyncio.AbstractEventLoop, deliver: Callable[[list[bytes]], object]
    ) -> None:
        self._socket = socket
        self._loop = loop
        self._deliver = deliver
        self._soon: asyncio.Handle | None = None
        self._descriptor = int(socket.get(zmq.FD))
        loop.add_reader(self._descriptor, self._look)

    def connect(self, endpoint: str) -> None:
        """Hear that publisher or broker, whenever it is there. Raises `ConnectFailed` for an endpoint that makes no sense."""
        _connect(self._socket, endpoint)
        self._look_soon()

    def disconnect(self, endpoint: str) -> None:
        """Hear it no more. What of it is here already is delivered first."""
        self._take(_AT_MOST)
        try:
            self._socket.disconnect(endpoint)
        except zmq.ZMQError as error:
            logger.debug("disconnecting from %s: %s", endpoint, error.strerror)
        self._look_soon()

    def _look_soon(self) -> None:
        if self._soon is None:
            self._soon = self._loop.call_soon(self._look)

    def _look(self) -> None:
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        done = False
        try:
            done = self._take(_AT_ONCE)
        finally:
            if not done:
                self._look_soon()

    def _take(self, most: int) -> bool:
        """Deliver what is here, at most so many messages; False: there may be more."""
        receive, get = self._socket.recv, self._socket.get
        try:
            for _ in range(most):
                frames = [receive(_NOWAIT)]
                while get(_RCVMORE):
                    frame = receive(_NOWAIT)
                    if len(frames) <= FRAMES:  # one too many shows that it is none of ours
                        frames.append(frame)
                self._deliver(frames)
        except zmq.Again:
            return True
        except zmq.ZMQError as error:
            logger.error("events can no longer be read: %s", error.strerror)
            self._loop.remove_reader(self._descriptor)
            return True
        return False

    def close(self) -> None:
        """At once. Idempotent."""
        if self._socket.closed:
            return
        self._loop.remove_reader(self._descriptor)
        if self._soon is not None:
            self._soon.cancel()
        self._socket.close(0)


def _connect(socket: "zmq.Socket[bytes]", endpoint: str) -> None:
    socket.set(zmq.IPV6, int("[" in endpoint))
    try:
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise ConnectFailed(f"{endpoint!r} is no address of events: {error.strerror}", phase="connect") from error
