"""A TCP connection without sockets: two transports and the bytes between them, which move when the test says so.

It behaves as TCP does where protocols can tell: a full receiver pauses its sender, closing sends what was written and then the end of
the stream, a reset may overtake bytes, who writes to a closed socket is reset, and who has seen the end of the input hears of a reset
only by writing.
"""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, cast

__all__ = ["CAPACITY", "Pipe", "PipeEnd"]

CAPACITY = 16 * 1024
"""bytes that the kernels of both ends hold in one direction"""

_TCP_ESTABLISHED, _TCP_CLOSE = 1, 7


class Pipe:
    """One connection. `dialled` is the transport of who made it, `accepted` the other one."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        dialling: asyncio.BaseProtocol,
        accepting: asyncio.BaseProtocol,
        *,
        lose: Callable[[], bool],
        reset_on_close: bool,
    ) -> None:
        self.dialled = PipeEnd(loop, dialling, lose, reset_on_close=False)
        self.accepted = PipeEnd(loop, accepting, lose, reset_on_close=reset_on_close)
        self.dialled.peer, self.accepted.peer = self.accepted, self.dialled

    @property
    def ends(self) -> tuple["PipeEnd", "PipeEnd"]:
        return self.dialled, self.accepted

    @property
    def over(self) -> bool:
        """Both protocols have been told the end."""
        return all(end.lost for end in self.ends)

    def carry(self, most: int | None = None) -> int:
        """Move bytes, at most `most` each way, and what follows them; returns how much moved. Call it with the loop running."""
        return sum(end.carry(most) for end in self.ends)

    def cut(self) -> None:
        """The network breaks: both ends are reset."""
        for end in self.ends:
            end.reset(lose=True)


class PipeEnd(asyncio.Transport):
    """One end: the transport of its protocol, and the bytes on the way to the other end."""

    peer: "PipeEnd"

    def __init__(
        self, loop: asyncio.AbstractEventLoop, protocol: asyncio.BaseProtocol, lose: Callable[[], bool], *, reset_on_close: bool
    ) -> None:
        super().__init__()
        self.protocol = protocol
        self.lost = False
        """its protocol has been told the end"""
        self._loop = loop
        self._lose = lose
        self._reset_on_close = reset_on_close
        self._pending = bytearray()
        self._high = 64 * 1024
        self._paused_writing = False
        self._reading = True
        self._made = False
        self._closing = False
        self._fin = False
        """what is pending is followed by the end of the stream"""
        self._gone = False
        """its socket is closed: nothing is taken any more"""
        self._read_end = False
        """the end of the input was seen"""
        self._rst = False
        """a reset follows what is pending for us"""
        self._was_reset = False

    def made(self) -> None:
        """Tell the protocol."""
        self._loop.call_soon(self._tell_made)

    def _tell_made(self) -> None:
        self._made = True
        self.protocol.connection_made(self)

    # -- asyncio.Transport

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"socket": self, "peername": ("127.0.0.1", 1)}.get(name, default)

    family = socket.AF_UNSPEC

    def getsockopt(self, level: int, option: int, size: int = 0) -> bytes:
        """TCP_INFO: its first byte is the state."""
        return bytes([_TCP_CLOSE if self._was_reset or self._rst else _TCP_ESTABLISHED])

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 * 1024 if high is None else high

    def get_write_buffer_size(self) -> int:
        return max(0, len(self._pending) - CAPACITY)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocol

    def is_closing(self) -> bool:
        return self._closing

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self._fin = True

    def write(self, data: Any) -> None:
        assert not self._fin, "written behind the end"
        if self._gone:
            return
        if self._was_reset:
            self._end(ConnectionResetError("written to a connection that was reset"))
            return
        self._pending += data
        if not self._paused_writing and self.get_write_buffer_size() > self._high:
            self._paused_writing = True
            cast(asyncio.Protocol, self.protocol).pause_writing()

    def close(self) -> None:
        """Send what was written, then the end of the stream; with `reset_on_close` a reset, as soon as the kernel has it all."""
        if not self._closing:
            self._closing = self._fin = True
            self._close_if_sent()

    def abort(self) -> None:
        """Reset the connection."""
        if not self._gone:
            self._reset_peer()
            self._end(None)

    # -- the network

    def carry(self, most: int | None) -> int:
        """Move bytes of this end to the other one."""
        peer = self.peer
        moved = 0
        if not peer._made or not self._made:
            return 0
        if self._pending and peer._gone:
            self._pending.clear()
            self.reset(lose=True)
            return 1
        if self._pending and peer._reading and not peer._closing and not peer._read_end:
            moved = min(len(self._pending), CAPACITY, len(self._pending) if most is None else most)
            data = bytes(self._pending[:moved])
            del self._pending[:moved]
            cast(asyncio.Protocol, peer.protocol).data_received(data)
            self._resume_writing()
        elif self._pending and peer._closing:
            moved = len(self._pending)  # read by nobody
            self._pending.clear()
            self._resume_writing()
        if not self._pending:
            moved += self._carry_end()
        return moved

    def _resume_writing(self) -> None:
        if self._paused_writing and not self.get_write_buffer_size():
            self._paused_writing = False
            if not self.lost:
                cast(asyncio.Protocol, self.protocol).resume_writing()
        self._close_if_sent()

    def _carry_end(self) -> int:
        """The end of the stream, or the reset, behind the bytes."""
        peer = self.peer
        if peer._rst:
            peer._rst = False
            peer._reset_noticed()
            return 1
        if self._fin and not peer._read_end and not peer._gone and peer._reading and not peer._closing:
            peer._read_end = True
            if not cast(asyncio.Protocol, peer.protocol).eof_received():
                peer.close()
            return 1
        return 0

    def reset(self, *, lose: bool) -> None:
        """A reset arrives here, overtaking bytes on their way to us if they are to be lost."""
        if self._gone:
            return
        self._pending.clear()
        self._rst = True
        if lose:
            self.peer._pending.clear()
            self._rst = False
            self._reset_noticed()

    def _reset_noticed(self) -> None:
        self._was_reset = True
        if not self._read_end:  # else nobody reads any more, and only a write tells
            self._end(ConnectionResetError("connection reset by peer"))
        elif self._closing:
            self._end(None)

    def _reset_peer(self) -> None:
        self._fin = False
        if self._lose():
            self._pending.clear()
        del self._pending[CAPACITY:]
        self.peer.reset(lose=not self._pending)

    def _close_if_sent(self) -> None:
        """A closing transport is gone once the kernel has taken all."""
        if self._closing and not self._gone and not self.get_write_buffer_size():
            if self._reset_on_close:
                self._reset_peer()
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self._gone:
            self._gone = self._closing = True
            self._loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        self.lost = True
        self.protocol.connection_lost(error)
