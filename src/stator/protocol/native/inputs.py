"""The inputs of a bidirectional request on the native plane: the caller's sending half, the worker's receiving one.

InputSender   ITEMS…, LAST or END  ─▶   InputReader
                          CREDIT   ◀─
"""

from stator.errors import PeerProtocolError, UsageError
from stator.protocol.native.frames import LAST
from stator.protocol.native.incoming import MOST_CREDIT, Incoming, read_credit
from stator.protocol.native.outgoing import Sender
from stator.protocol.native.session import Session
from stator.protocol.stream import Receiver
from stator.protocol.values import encode_json

__all__ = ["InputReader", "InputSender"]


class InputSender(Sender):
    """What a caller sends in one conversation. It starts without credit: the worker grants some when its handler is called."""

    __slots__ = ("_session", "over")

    def __init__(self, session: Session, number: int) -> None:
        super().__init__(session.outgoing, number, 0)
        self.over = False
        """nothing more is taken: the input was ended, or the conversation is over"""
        self._session = session

    def put(self, item: object) -> int:
        """Encode and queue one input; returns how many wait for the flush.

        Raises `EngineError` for a value without JSON form and `UsageError` for an input that the worker does not accept; nothing was
        queued then.
        """
        queued = self.push(encode_json(item))
        peer = self._session.peer
        if peer is not None and (size := self.take_back(above=peer.limits.item)):
            raise UsageError(f"an input has {size} bytes, the instance accepts {peer.limits.item}")
        return queued

    def end(self) -> None:
        """No further inputs; those queued still leave. Idempotent."""
        if not self.over:
            self.over = True
            self.finish(b"")

    def close(self) -> None:
        """The conversation is over or stopped: nothing more leaves. Idempotent."""
        self.over = True
        self.drop()
        self.credited()

    def credit_frame(self, payload: bytes) -> None:
        """A CREDIT frame for this stream."""
        amount = read_credit(payload)
        if self.credit + amount > MOST_CREDIT:
            raise PeerProtocolError(f"stream {self.number} was granted {self.credit + amount} bytes, allowed are {MOST_CREDIT}")
        self.grant(amount)


class InputReader(Incoming):
    """The worker's half; the `StreamLink` of what the handler reads. Holds nothing before `open`."""

    __slots__ = ("_done",)

    def __init__(self, session: Session, number: int, receiver: Receiver) -> None:
        super().__init__(session, number, receiver, 0)
        self._done = False

    # -- StreamLink

    def stop(self) -> None:
        """The caller is not asked to end its inputs early: it hears of the answer's end."""

    def kill(self) -> None:
        """The handler reads no more; what still comes is dropped under its credit."""

    def taken(self) -> None:
        if self._window:
            super().taken()

    # -- frames

    def open(self, window: int) -> None:
        """The handler was called: let the caller send. `window` is returned by `release`."""
        self._window = window
        self._grant(window)

    def input_frame(self, flags: int, count: int, payload: bytes) -> None:
        """An ITEMS frame. Raises `PeerProtocolError` for one behind the end; those behind a stop are dropped."""
        if self._done:
            raise PeerProtocolError(f"stream {self.number} has inputs behind their end")
        if not self.receiver.ended:
            self.items(flags, count, payload)
        if flags & LAST:
            self.end()

    def end(self) -> None:
        """The inputs are complete."""
        if self._done:
            raise PeerProtocolError(f"the inputs of stream {self.number} ended twice")
        if self.in_mid_item and not self.receiver.ended:
            raise PeerProtocolError(f"the inputs of stream {self.number} ended in the middle of one")
        self._done = True
        self.receiver.finish()
