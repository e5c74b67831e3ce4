"""Request connections of a client: pipelined, acknowledged in order, pooled per worker process (`spec/10 §1.4`)."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import cast

from stator.errors import ConnectFailed, Disconnected, NotTrusted, PeerProtocolError, StatorError, Timeout
from stator.protocol.request_frame import AcknowledgementParser
from stator.security import Refusals, Tls, connecting, is_tls
from stator.tasks import DeadlineWheel, Scope
from stator.tasks.wheel import Timed
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


class RequestPool:
    """The lines to one worker process. A second one is made only when the first is full, and so on."""

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
        self.host = host
        self.port = port
        self._config = config
        self._wheel = wheel
        self._tls = tls
        self._refusals = refusals or Refusals()
        self._dials = dials
        self._connects = connects
        self._empty = empty
        self._lines: list[RequestLine] = []
        self._dialling: asyncio.Task[OSError | None] | None = None
        self._refusal: NotTrusted | None = None
        """of the line that ended last, while somebody waits"""
        self._callers = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def lines(self) -> int:
        """Open connections."""
        return len(self._lines)

    def line(self) -> RequestLine | None:
        """A line that takes a request now."""
        for line in self._lines:
            if line.usable:
                return line
        return None

    async def wait(self, instance: int) -> RequestLine:
        """A line as soon as there is one. Raises `ConnectFailed` or `Timeout` (phase "connect"). Cancelled: nothing changed."""
        limit = self._config.connect_timeout
        if not self._callers:
            self._refusal = None
        self._callers += 1
        try:
            async with asyncio.timeout(limit):
                while (line := self.line()) is None:
                    await self._progress()
                    if self._refusal is not None:
                        raise self._refusal
                return line
        except TimeoutError as error:
            raise Timeout(
                f"no connection to {self.host}:{self.port} within {limit} s", instance=instance, phase="connect"
            ) from error
        except NotTrusted as error:
            text = f"cannot connect to {self.host}:{self.port}: {error}"
            raise NotTrusted(text, reason=error.reason, instance=instance) from error
        except OSError as error:
            raise ConnectFailed(
                f"cannot connect to {self.host}:{self.port}: {error}", instance=instance, phase="connect"
            ) from error
        finally:
            self._callers -= 1
            self._leave_if_empty()

    async def _progress(self) -> None:
        """Wait for a dial, which all callers share, or for room on a line once there are `pool_size` of them."""
        if self._dials.closed:
            raise ConnectionAbortedError("the client closed its plane")
        if self._dialling is None and len(self._lines) < self._config.pool_size:
            self._dialling = self._dials.spawn(self._dial(), name=f"dial {self.host}:{self.port}")
            self._dialling.add_done_callback(self._dialled)
        if self._dialling is not None:
            await _shared(self._dialling)
            return
        waiter = self._wheel.loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    async def _dial(self) -> OSError | None:
        """Make a line; or why there is none: a failed dial is not a failed task."""
        try:
            await self._add_line()
        except OSError as error:
            return error
        finally:
            self._dialling = None  # at once: who waited for a task that has ended would not let the loop go on
        return None

    async def _add_line(self) -> None:
        line = RequestLine(config=self._config, wheel=self._wheel, refusals=self._refusals, freed=self._freed, gone=self._lost)
        async with self._connects, asyncio.timeout(self._config.connect_timeout):
            await connecting(line, self.host, self.port, tls=self._tls, refusals=self._refusals)
        if not line.usable:
            raise ConnectionResetError("the connection ended at once")
        self._lines.append(line)

    def _dialled(self, task: asyncio.Task[OSError | None]) -> None:
        if self._dialling is task:  # cancelled before it began
            self._dialling = None
        self._freed()
        self._leave_if_empty()

    def _freed(self) -> None:
        """There may be room: let those who wait look."""
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _lost(self, line: RequestLine) -> None:
        self._refusal = line.refusal
        if line in self._lines:
            self._lines.remove(line)
        self._freed()
        self._leave_if_empty()

    def _leave_if_empty(self) -> None:
        if not self._lines and self._dialling is None and not self._callers:
            self._empty(self)

    def abort(self, reason: StatorError) -> None:
        """Close all lines."""
        for line in tuple(self._lines):
            line.abort(reason)


async def _shared(task: asyncio.Task[OSError | None]) -> None:
    """Wait for a task that others wait for too; raises what it found. Its own cancellation is an `OSError` here, ours leaves it alone."""
    try:
        failure = await asyncio.shield(task)
        if failure is not None:
            raise failure
    except asyncio.CancelledError:
        ours = asyncio.current_task()
        if task.cancelled() and ours is not None and not ours.cancelling():
            raise ConnectionAbortedError("the client closed its plane") from None
        raise
