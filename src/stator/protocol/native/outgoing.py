"""What leaves a native connection: control frames first, then one frame of each stream in turn (`docs/native-plane.md §6`)."""

from collections import deque
from collections.abc import Callable

from stator.protocol.native.frames import ACCEPT, END, ITEMS, LAST, MAX_PAYLOAD, MORE, OPEN, frame, pack_header

__all__ = ["ITEM_OVERHEAD", "Outgoing", "RequestSender", "Sender"]

ITEM_OVERHEAD = 64
"""bytes an item is charged beyond its own, so that empty items are not free"""

Buffer = bytes | memoryview

FLUSH_LIMIT = 1024 * 1024
"""bytes of stream data one flush takes"""

EARLY = 16
"""frames or streams waiting at which a flush does not wait for the end of the loop's turn, so that both ends work at the same time;
each further one of the same turn waits for twice as many, so that a step of hundreds of streams takes a few writes"""


class Outgoing:
    """Bytes on their way out of one connection. `wake` is called when there is something to send and there was nothing before, `hurry`
    when there is much: flush at once then.
    """

    __slots__ = ("_awake", "_control", "_early", "_ready", "hurry", "wake", "writable")

    def __init__(self, wake: Callable[[], None], hurry: Callable[[], None]) -> None:
        self.wake = wake
        self.hurry = hurry
        self.writable = True
        """False while the transport asks its producers to pause"""
        self._awake = False
        self._early = EARLY
        self._control: list[Buffer] = []
        self._ready: deque[Sender | RequestSender] = deque()

    def __len__(self) -> int:
        return len(self._control) + len(self._ready)

    def control(self, data: bytes) -> None:
        """Queue a whole frame ahead of all stream data."""
        self._control.append(data)
        if not self._awake:
            self._awake = True
            self.wake()
        elif len(self._control) >= self._early:
            self._early *= 2
            self.hurry()

    def ready(self, sender: "Sender | RequestSender") -> None:
        """`sender` has something and is not queued."""
        if len(self._ready) >= self._early:  # those before it have had their turn of the loop
            self._early *= 2
            self.hurry()
        self._ready.append(sender)
        if not self._awake:
            self._awake = True
            self.wake()

    def remove(self, sender: "Sender | RequestSender") -> bool:
        """Forget a queued sender; False if it was not queued."""
        try:
            self._ready.remove(sender)
        except ValueError:
            return False
        return True

    def end_turn(self) -> None:
        """The loop's turn is over; `data_to_send` is called next."""
        self._early = EARLY

    def data_to_send(self) -> bytes:
        """What to write now: every control frame, and stream data up to `FLUSH_LIMIT` unless the transport is paused.

        `wake` is called again at once if something is left that may be written; after a pause call `resume`.
        """
        self._awake = False
        out = self._control
        self._control = []
        if self.writable and self._ready:
            ready = self._ready
            budget = FLUSH_LIMIT
            while ready and budget > 0:
                sender = ready.popleft()
                budget -= sender.fill(out)
                if sender.queued:
                    ready.append(sender)
            if ready and not self._awake:
                self._awake = True
                self.wake()
        return b"".join(out)

    def resume(self) -> None:
        """The transport takes data again."""
        self.writable = True
        if (self._ready or self._control) and not self._awake:
            self._awake = True
            self.wake()


class Sender:
    """The sending half of one stream's items: credit, what was encoded and not sent, and the end that follows it.

    `push` is the token path. A subclass is told by `drained` when its queue has left and by `credited` when it may send again.
    """

    __slots__ = (
        "_end",
        "_granted",
        "_offset",
        "_parts",
        "_size",
        "accepting",
        "credit",
        "number",
        "outgoing",
        "queued",
        "sent_items",
    )

    def __init__(self, outgoing: Outgoing, number: int, credit: int) -> None:
        self.outgoing = outgoing
        self.number = number
        self.credit = credit
        self._granted = credit
        self.sent_items = 0
        """items taken for sending"""
        self.queued = False
        self._parts: list[bytes] = []
        self._size = 0
        self._offset = 0
        self._end: bytes | None = None
        self.accepting = False
        """an ACCEPT is due, unless items or the end leave first and imply it"""

    def drained(self) -> None:
        """Everything queued has left."""

    def credited(self) -> None:
        """Credit arrived."""

    @property
    def waiting(self) -> int:
        """Items queued and not sent."""
        return len(self._parts)

    @property
    def sent_bytes(self) -> int:
        """Bytes of the items taken for sending, without framing."""
        return self._granted - self.credit - ITEM_OVERHEAD * self.sent_items

    def push(self, data: bytes) -> int:
        """Queue one encoded item; the answer is the number of items now waiting for the flush."""
        parts = self._parts
        parts.append(data)
        size = len(data) + 1
        self._size += size
        self.sent_items += 1
        self.credit -= size + ITEM_OVERHEAD
        if not self.queued:
            self.queued = True
            self.outgoing.ready(self)
        return len(parts)

    def take_back(self, *, above: int) -> int:
        """Unqueue the item pushed last if it has more than `above` bytes; returns its size, or 0 if it stays."""
        parts = self._parts
        if not parts or len(parts[-1]) <= above:
            return 0
        size = len(parts.pop())
        self._size -= size + 1
        self.sent_items -= 1
        self.credit += size + 1 + ITEM_OVERHEAD
        return size

    def finish(self, end: bytes) -> None:
        """Queue the END behind the items; `end` is its payload, empty for a complete stream."""
        self._end = end
        if not self.queued:
            self.queued = True
            self.outgoing.ready(self)

    def grant(self, amount: int) -> None:
        """A CREDIT frame arrived."""
        self._granted += amount
        self.credit += amount
        self.credited()

    def drop(self) -> None:
        """Send nothing more of this stream."""
        self._parts.clear()
        self._size = self._offset = 0
        self._end = None
        self.accepting = False
        if self.queued:
            self.outgoing.remove(self)
            self.queued = False

    def fill(self, out: list[Buffer]) -> int:
        """Append one frame (and the END, if it comes next) to `out`; returns the bytes taken. Clears `queued` when nothing is left."""
        size = self._size
        if size <= MAX_PAYLOAD and not self._offset:
            parts = self._parts
            if parts:
                count = len(parts)
                parts.append(b"")
                flags = 0
                if self._end == b"":  # complete: the last frame says it
                    flags = LAST
                    self._end = None
                out.append(pack_header(size, ITEMS, flags, count, self.number))
                out.append(b"\n".join(parts))
                parts.clear()
                self._size = 0
                self.accepting = False
            elif self.accepting:
                self.accepting = False
                if self._end is None:
                    out.append(pack_header(0, ACCEPT, 0, 0, self.number))
        else:
            size = self._fill_large(out)
        if not self._parts:
            if self._end is not None:
                out.append(frame(END, self.number, self._end))
                self._end = None
            self.queued = False
            self.drained()
        return size

    def _fill_large(self, out: list[Buffer]) -> int:
        """More than a frame holds: as many whole items as fit, or one fragment of an item that does not."""
        parts = self._parts
        first = parts[0]
        if len(first) + 1 > MAX_PAYLOAD:
            return self._fragment(out, first)
        taken = size = 0
        while taken < len(parts) and size + len(parts[taken]) + 1 <= MAX_PAYLOAD:
            size += len(parts[taken]) + 1
            taken += 1
        batch = parts[:taken]
        batch.append(b"")
        del parts[:taken]
        out.append(pack_header(size, ITEMS, 0, taken, self.number))
        out.append(b"\n".join(batch))
        self._size -= size
        return size

    def _fragment(self, out: list[Buffer], item: bytes) -> int:
        piece = memoryview(item)[self._offset : self._offset + MAX_PAYLOAD]
        size = len(piece)
        self._offset += size
        if self._offset < len(item) or size == MAX_PAYLOAD:
            out += (pack_header(size, ITEMS, MORE, 0, self.number), piece)
        else:
            size += 1
            out += (pack_header(size, ITEMS, 0, 1, self.number), piece, b"\n")
            self._offset = 0
            del self._parts[0]
        self._size -= size
        return size


class RequestSender:
    """An OPEN message larger than one frame, or one that a paused transport held up, on its way out piece by piece.

    `opening` is all of it but the payload, and fits in the first frame.
    """

    __slots__ = ("_opening", "_payload", "number", "queued", "started")

    def __init__(self, number: int, opening: bytes, payload: bytes) -> None:
        self.number = number
        self.queued = True
        self.started = False
        """whether a part of it has left"""
        self._opening = opening
        self._payload = memoryview(payload)

    def fill(self, out: list[Buffer]) -> int:
        """Append the next fragment."""
        opening, self._opening = self._opening, b""
        room = MAX_PAYLOAD - len(opening)
        piece, self._payload = self._payload[:room], self._payload[room:]
        size = len(opening) + len(piece)
        self.started = True
        self.queued = len(self._payload) > 0
        out += (pack_header(size, OPEN, MORE if self.queued else 0, 0, self.number), opening, piece)
        return size
