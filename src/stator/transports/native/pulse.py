"""The pulse: a thread without event loop that says whether the process lives, and how late its loop is (`docs/native-plane.md §8`)."""

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import Callable
from random import Random
from struct import Struct

import msgspec

from stator.clock import Clock
from stator.errors import PeerProtocolError
from stator.protocol.control_message import parse_address
from stator.protocol.records import NativeAddress

__all__ = ["Pulse", "PulseAddress", "PulseProbe", "find_pulse"]

logger = logging.getLogger(__name__)

_ASK = Struct(">4s8s16s")
_ANSWER = Struct(">4s8sI")
_ASK_MAGIC, _ANSWER_MAGIC = b"STP1", b"stp1"
_BEAT = 0.1
"""seconds between the loop's marks"""


class Pulse:
    """Answers pulse questions for one process. `start` and `aclose` are called on the loop it watches; the socket is bound at once."""

    def __init__(self, host: str, process: str, clock: Clock) -> None:
        self._process = bytes.fromhex(process)
        self._clock = clock
        self._beat_at = clock.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._closing = threading.Event()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind((host, 0))
        self._thread = threading.Thread(target=self._answer, name="stator-pulse", daemon=True)

    @property
    def port(self) -> int:
        """The UDP port it answers on."""
        return self._socket.getsockname()[1]

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to mark the loop's life and to answer."""
        self._mark(loop)
        self._thread.start()

    def _mark(self, loop: asyncio.AbstractEventLoop) -> None:
        self._beat_at = self._clock.monotonic()
        self._timer = loop.call_later(_BEAT, self._mark, loop)

    def _answer(self) -> None:
        while not self._closing.is_set():
            try:
                data, sender = self._socket.recvfrom(64)
            except OSError:  # never for good: only _end() closes the socket, after this thread
                self._closing.wait(_BEAT)
                continue
            if len(data) != _ASK.size:
                continue
            magic, token, process = _ASK.unpack(data)
            if magic != _ASK_MAGIC or process != self._process:
                continue
            late = max(0.0, self._clock.monotonic() - self._beat_at - _BEAT)
            with contextlib.suppress(OSError):
                self._socket.sendto(_ANSWER.pack(_ANSWER_MAGIC, token, min(int(late * 1000), 2**32 - 1)), sender)

    async def aclose(self) -> None:
        """Stop answering. Idempotent; cancelled: the thread ends nevertheless."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            await asyncio.to_thread(self._end)

    def _end(self) -> None:
        """Wake the thread with a datagram, and wait for it."""
        self._closing.set()
        address = self._socket.getsockname()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
        with contextlib.suppress(OSError):
            self._socket.sendto(b"\0", (host, address[1]))
        self._thread.join(1.0)
        self._socket.close()


class PulseAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where and whom to ask: an IP address, and the process that must answer."""

    host: str
    port: int
    process: bytes


async def find_pulse(loop: asyncio.AbstractEventLoop, native: NativeAddress) -> PulseAddress | None:
    """The pulse of a record, None if there is none. Names are looked up here, once: asking must not wait."""
    if not native.pulse:
        return None
    try:
        host, port = parse_address(native.pulse)
        process = _process(native)
        if not _is_numeric(host):
            host = str((await loop.getaddrinfo(host, port, type=socket.SOCK_DGRAM))[0][4][0])
        return PulseAddress(host=host, port=port, process=process)
    except (OSError, ValueError, PeerProtocolError) as error:
        logger.warning("no pulse of process %s at %r: %s", native.process[:8], native.pulse, error)
        return None


def _is_numeric(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _process(native: NativeAddress) -> bytes:
    process = bytes.fromhex(native.process)
    if len(process) != 16:
        raise PeerProtocolError("the process id of a record has 32 hex digits")
    return process


class PulseProbe:
    """Asks pulses. One socket per address family and client process, opened at the first question; questions are fire and forget, an
    answer calls back once.
    """

    _MOST_PENDING = 4096

    def __init__(self, loop: asyncio.AbstractEventLoop, random: Random) -> None:
        self._loop = loop
        self._random = random
        self._sockets: dict[int, socket.socket] = {}
        self._pending: dict[bytes, Callable[[float], None]] = {}
        self._closed = False

    def ask(self, pulse: PulseAddress, answered: Callable[[float], None]) -> None:
        """Send one question; `answered(seconds late)` follows if there is a pulse. Never raises: what cannot be sent is not answered."""
        if self._closed:
            return
        while len(self._pending) >= self._MOST_PENDING:
            del self._pending[next(iter(self._pending))]
        token = self._random.randbytes(8)
        try:
            self._socket(pulse.host).sendto(_ASK.pack(_ASK_MAGIC, token, pulse.process), (pulse.host, pulse.port))
        except (OSError, ValueError) as error:
            logger.debug("pulse at %s:%d cannot be asked: %s", pulse.host, pulse.port, error)
            return
        self._pending[token] = answered

    def _socket(self, host: str) -> socket.socket:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = self._sockets.get(family)
        if sock is None:
            sock = self._sockets[family] = socket.socket(family, socket.SOCK_DGRAM)
            sock.setblocking(False)
            self._loop.add_reader(sock, self._received, sock)
        return sock

    def _received(self, sock: socket.socket) -> None:
        try:
            data, _ = sock.recvfrom(64)
        except OSError:  # nothing there after all, or a port was unreachable: no pulse, which the silence will tell
            return
        if len(data) != _ANSWER.size:
            return
        magic, token, late = _ANSWER.unpack(data)
        answered = self._pending.pop(token, None) if magic == _ANSWER_MAGIC else None
        if answered is not None:
            answered(late / 1000)

    def close(self) -> None:
        """Forget every question. Idempotent."""
        self._closed = True
        self._pending.clear()
        for sock in self._sockets.values():
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()
