"""The pulse: a thread without event loop that says whether the process lives, and how late its loop is (`docs/native-plane.md §8`)."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from random import Random
from struct import Struct
from typing import cast

from stator.clock import Clock

__all__ = ["Pulse", "PulseProbe"]

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
        while True:
            try:
                data, sender = self._socket.recvfrom(64)
            except OSError:
                return
            if len(data) == 1:  # _end() wakes the thread
                return
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
        """Wake the thread with a datagram of one byte, and wait for it."""
        address = self._socket.getsockname()
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address[0], address[0])
        with contextlib.suppress(OSError):
            self._socket.sendto(b"\0", (host, address[1]))
        self._thread.join(1.0)
        self._socket.close()


class PulseProbe(asyncio.DatagramProtocol):
    """Asks pulses. One socket per client process; questions are fire and forget, an answer calls back once."""

    _MOST_PENDING = 4096

    def __init__(self, random: Random) -> None:
        self._random = random
        self._transport: asyncio.DatagramTransport | None = None
        self._pending: dict[bytes, Callable[[float], None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's transports are not subclasses

    def datagram_received(self, data: bytes, addr: object) -> None:
        if len(data) != _ANSWER.size:
            return
        magic, token, late = _ANSWER.unpack(data)
        answered = self._pending.pop(token, None) if magic == _ANSWER_MAGIC else None
        if answered is not None:
            answered(late / 1000)

    def error_received(self, exc: Exception) -> None:
        """Port unreachable: no pulse, which the silence will tell."""

    def ask(self, address: str, process: str, answered: Callable[[float], None]) -> None:
        """Send one question to `host:port`; `answered(seconds late)` follows if there is a pulse."""
        if self._transport is None or self._transport.is_closing():
            return
        while len(self._pending) >= self._MOST_PENDING:
            del self._pending[next(iter(self._pending))]
        token = self._random.randbytes(8)
        self._pending[token] = answered
        host, _, port = address.rpartition(":")
        self._transport.sendto(_ASK.pack(_ASK_MAGIC, token, bytes.fromhex(process)), (host.strip("[]"), int(port)))

    def close(self) -> None:
        """Forget every question. Idempotent."""
        self._pending.clear()
        if self._transport is not None:
            self._transport.close()
