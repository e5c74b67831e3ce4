"""A ZMQ broker of one's own: XSUB for publishers, XPUB for subscribers, on two ports of 127.0.0.1, in a thread."""

import threading
from collections.abc import Generator
from contextlib import contextmanager

import zmq

__all__ = ["ZmqBroker", "zmq_broker"]

_STOP = 5.0


class ZmqBroker:
    """One proxy at a time. Calls block for a moment."""

    def __init__(self) -> None:
        self._ports: tuple[int, int] | None = None
        self._thread: threading.Thread | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None

    @property
    def endpoints(self) -> tuple[str, str]:
        """Where publishers, and where subscribers connect. The same after a restart."""
        if self._ports is None:
            raise RuntimeError("the broker was never started")
        return f"tcp://127.0.0.1:{self._ports[0]}", f"tcp://127.0.0.1:{self._ports[1]}"

    @property
    def setting(self) -> str:
        """The value of `zmq.broker`."""
        xsub, xpub = self.endpoints
        return f"xsub={xsub}, xpub={xpub}"

    def start(self) -> None:
        """Listen."""
        self._context = context = zmq.Context()
        sockets = [context.socket(kind) for kind in (zmq.XSUB, zmq.XPUB, zmq.PAIR)]
        for socket in sockets:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.SNDHWM, 100_000)
            socket.set(zmq.RCVHWM, 100_000)
        wanted = self._ports or (0, 0)
        for socket, port in zip(sockets, wanted, strict=False):
            socket.bind(f"tcp://127.0.0.1:{port}")
        found = [int(bytes(socket.get(zmq.LAST_ENDPOINT)).rpartition(b":")[2]) for socket in sockets[:2]]
        self._ports = (found[0], found[1])
        sockets[2].bind("inproc://control")
        self._thread = threading.Thread(target=_run, args=sockets, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End it, with everything that is connected. Idempotent."""
        thread, context = self._thread, self._context
        self._thread = self._context = None
        if thread is None or context is None:
            return
        control = context.socket(zmq.PAIR)
        control.connect("inproc://control")
        control.send(b"TERMINATE")
        thread.join(_STOP)
        control.close(0)
        context.term()


def _run(front: "zmq.Socket[bytes]", back: "zmq.Socket[bytes]", control: "zmq.Socket[bytes]") -> None:
    try:
        zmq.proxy_steerable(front, back, None, control)
    finally:
        for socket in (front, back, control):
            socket.close(0)


@contextmanager
def zmq_broker() -> Generator[ZmqBroker, None, None]:
    """A running broker."""
    broker = ZmqBroker()
    broker.start()
    try:
        yield broker
    finally:
        broker.stop()
