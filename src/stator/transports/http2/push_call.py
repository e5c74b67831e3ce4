"""One request towards a 1.2.1 worker: it says where home is, the status only that it was received (`spec/10 §7`)."""

from stator.errors import Disconnected, StatorError, Timeout
from stator.protocol.http2_exchange import Exchange
from stator.protocol.http2_frames import ErrorCode
from stator.protocol.http2_map import Fields, field_values, status_error
from stator.tasks import DeadlineWheel
from stator.tasks.wheel import Timed
from stator.transports.tcp.call_home import ExpectedStream

__all__ = ["PushCall"]


class PushCall(Exchange):
    """The request until its status is here, at most `limit` seconds; `stream` is who waits for the call."""

    __slots__ = ("_limit", "_stream", "_waiting", "_wheel", "slot")

    def __init__(self, stream: ExpectedStream, *, wheel: DeadlineWheel, limit: float) -> None:
        super().__init__(instance=stream.instance)
        self.slot: set[Timed] | None = None
        self._stream = stream
        self._wheel = wheel
        self._limit = limit
        self._waiting = True
        wheel.arm(self, wheel.now() + limit)

    def headers(self, fields: Fields) -> None:
        text = field_values(fields).get(":status", "")
        status = int(text) if text.isdigit() else 0
        if 200 <= status < 300:
            self._settle()
            self._stream.acknowledged(b"")
        else:
            self._fail(status_error(status, instance=self.instance))

    def ended(self) -> None:
        self._fail(Disconnected("the response ended without a status", instance=self.instance, phase="accept"))

    def lost(self, error: StatorError) -> None:
        self._fail(error)

    def expire(self, now: float) -> float:
        """Called by the wheel: the status is overdue."""
        self._fail(Timeout(f"no status within {self._limit:g} s", instance=self.instance, phase="accept"))
        self.reset(ErrorCode.CANCEL)
        return 0.0

    def _fail(self, error: StatorError) -> None:
        """No call will come; unless the status is here."""
        if self._waiting:
            self._settle()
            self._stream.fail(error)

    def _settle(self) -> None:
        self._waiting = False
        self._wheel.disarm(self)
