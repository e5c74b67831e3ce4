"""Request connections of a client: pipelined, acknowledged in order, pooled per worker process (`spec/10 §1.4`)."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import cast

from stator.errors import Disconnected, NotTrusted, PeerProtocolError, StatorError, Timeout
from stator.protocol.request_frame import AcknowledgementParser
from stator.security import Refusals, Tls, connecting, is_tls
from stator.tasks import DeadlineWheel, Scope
from stator.tasks.wheel import Timed
from stator.transports.line_pool import LinePool
from stator.transports.tcp.call_home import CallHomeListener, ExpectedStream
from stator.transports.tcp.config import TcpConfig

__all__ = ["RequestLine", "RequestPool"]

logger = logging.getLogger(__name__)

_HIGH_WATER = 256 * 1024
"""bytes not yet taken by the kernel at which a line counts as full"""


class RequestLine(asyncio.Protocol):
    """One connection. `freed` is called when it can take requests again, `gone` once, when it has ended."""

    slot: set[Timed] | None = None

    def __init__(
        self,
        *,
        config: TcpConfig,
        wheel: DeadlineWheel,
        refusals: Refusals | None = None,
        freed: Callable[[], None],
        gone: Callable[["RequestLine"], None],
    ) -> None:
        self._config = config
        self._wheel = wheel
        self._refusals = refusals or Refusals()
        self._freed = freed
        self._gone = gone
        self._parser = AcknowledgementParser()
        self._transport: asyncio.Transport | None = None
        self._pending: deque[tuple[ExpectedStream, float]] = deque()
        self._out: list[bytes] = []
        self._paused = False
        self._used = 0.0
        self._reason: StatorError | None = None
        self.refusal: NotTrusted | None = None
        """why the worker refused it: with TLS 1.3, after the dial has succeeded"""
        self._home: CallHomeListener | None = None

    @property
    def usable(self) -> bool:
        """Whether a request can be sent now."""
        return (
            not self._paused
            and len(self._pending) < self._config.pipeline
            and self._transport is not None
            and not self._transport.is_closing()
        )

    def send(self, frame: bytes, stream: ExpectedStream) -> None:
        """Send a request; `stream` hears of its acknowledgement, or that there will be none."""
        now = self._wheel.now()
        if not self._pending:
            self._wheel.arm(self, now + self._config.request_timeout)
        self._pending.append((stream, now))
        stream.line, self._home = self, stream.home
        if not self._out:
            self._wheel.loop.call_soon(self._flush)
        self._out.append(frame)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's transports are not subclasses
        self._transport.set_write_buffer_limits(high=_HIGH_WATER)
        self._used = self._wheel.now()
        self._wheel.arm(self, self._used + self._config.idle_timeout)

    def data_received(self, data: bytes) -> None:
        full = len(self._pending) >= self._config.pipeline
        try:
            for text in self._parser.receive_data(data):
                if not self._pending:
                    raise PeerProtocolError("an acknowledgement came without a request")
                stream = self._pending.popleft()[0]
                stream.home.traffic.received += len(text)
                stream.acknowledged(text)
        except PeerProtocolError as error:
            self._broken(error, data)
            return
        self._used = self._wheel.now()
        if full:
            self._freed()

    def _broken(self, error: PeerProtocolError, data: bytes) -> None:
        if is_tls(data):
            self._refusals.count("dialling", "encrypted")
            reason: StatorError = NotTrusted(
                "the worker speaks TLS, which is not set here (tls.ca_cert_path)", reason="encrypted"
            )
        else:
            reason = Disconnected(f"the worker broke the protocol: {error.message}", phase="accept")
        logger.warning("request connection closed: %s", reason)
        self.abort(reason)

    def pause_writing(self) -> None:
        self._paused = True

    def resume_writing(self) -> None:
        self._paused = False
        self._freed()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._wheel.disarm(self)
        if isinstance(exc, NotTrusted):
            self.refusal = exc
        self._gone(self)
        why = f"the connection ended before the request was acknowledged: {exc or 'closed by the worker'}"
        reason = self._reason or self.refusal or Disconnected(why)
        pending, self._pending = self._pending, deque()
        if pending and self._home is not None:
            self._home.traffic.failed += len(pending)
        for stream, _ in pending:
            stream.fail(type(reason)(reason.message, instance=stream.instance, phase="accept"))
        if self._reason is None and self._home is not None:
            self._home.line_lost(self)

    # -- ends

    def expire(self, now: float) -> float:
        """Called by the wheel: is an acknowledgement overdue, or the line idle for long?"""
        if self._pending:
            due = self._pending[0][1] + self._config.request_timeout
            if now < due:
                return due
            self.abort(Timeout(f"no acknowledgement within {self._config.request_timeout} s", phase="accept"))
            return 0.0
        due = self._used + self._config.idle_timeout
        if now < due:
            return due
        self.abort(Disconnected("the connection was idle"))
        return 0.0

    def abort(self, reason: StatorError) -> None:
        """Close at once; requests not acknowledged fail with `reason`."""
        if self._reason is None:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()


class RequestPool(LinePool[RequestLine]):
    """The lines to one worker process."""

    def __init__(
        self,
        host: str,
        port: int,
        *,
        config: TcpConfig,
        wheel: DeadlineWheel,
        tls: Tls | None = None,
        refusals: Refusals | None = None,
        dials: Scope,
        connects: asyncio.Semaphore,
        empty: Callable[["RequestPool"], None],
    ) -> None:
        super().__init__(f"{host}:{port}", most=config.pool_size, limit=config.connect_timeout, dials=dials, empty=empty)
        self.host = host
        self.port = port
        self._config = config
        self._wheel = wheel
        self._tls = tls
        self._refusals = refusals or Refusals()
        self._connects = connects
        self._refusal: NotTrusted | None = None
        """of the line that ended last, while somebody waits"""

    async def wait(self, instance: int) -> RequestLine:
        if not self._callers:
            self._refusal = None
        return await super().wait(instance)

    async def _progress(self) -> None:
        await super()._progress()
        if self._refusal is not None:
            raise self._refusal

    async def _connect(self) -> RequestLine:
        line = RequestLine(config=self._config, wheel=self._wheel, refusals=self._refusals, freed=self._freed, gone=self._lost)
        async with self._connects, asyncio.timeout(self._limit):
            await connecting(line, self.host, self.port, tls=self._tls, refusals=self._refusals)
        if not line.usable:
            raise ConnectionResetError("the connection ended at once")
        return line

    def _lost(self, line: RequestLine) -> None:
        self._refusal = line.refusal
        super()._lost(line)

    def abort(self, reason: StatorError) -> None:
        """Close all lines."""
        for line in self.lines:
            line.abort(reason)
