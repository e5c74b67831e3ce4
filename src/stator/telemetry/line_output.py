"""Whole lines to the stream that the log goes to, without waiting for who reads it.

A worker whose stderr is a pipe that nobody empties must go on serving: what does not fit is kept, up to a limit, and what is beyond
that is dropped and counted. Lines of `logging` and these never mix inside a line: both are written under the handler's lock, and a
pipe takes up to 4 KiB as a whole or not at all.
"""

import os
import select
import socket
import stat
from collections import deque
from contextlib import suppress
from typing import TextIO

from stator.telemetry.logs import LineHandler

__all__ = ["LineOutput"]

_PIECE = 4096
"""bytes; a pipe that is ready takes as much at once (PIPE_BUF)"""
_HELD = 2**20
"""bytes kept for a stream that takes nothing; what is put first is kept whatever its size"""


class LineOutput:
    """Lines waiting for one stream after the other: the one of the handler given last."""

    __slots__ = ("_held", "_pieces", "_pipe", "dropped", "unreported")

    def __init__(self) -> None:
        self._pieces: deque[bytes] = deque()
        self._held = 0
        self._pipe: _Pipe | None = None
        self.dropped = 0
        """lines lost so far"""
        self.unreported = 0
        """those of them that no line has told yet; set to 0 by who tells"""

    def __len__(self) -> int:
        """Bytes that wait."""
        return self._held

    def put(self, lines: bytes) -> None:
        """Take complete lines in UTF-8, each with its newline, to be written by `write`."""
        if self._held and self._held + len(lines) > _HELD:
            self.lost(lines.count(b"\n"))
            return
        self._held += len(lines)
        begin = 0
        while begin < len(lines):
            end = lines.rfind(b"\n", begin, begin + _PIECE) + 1 or lines.find(b"\n", begin) + 1
            self._pieces.append(lines[begin:end])
            begin = end

    def write(self, handler: LineHandler, patience: float = 0.0) -> None:
        """Write what the stream of `handler` takes now; waits at most `patience` seconds for it to take anything. The rest goes on
        waiting. A stream that fails loses the lines; that never raises.
        """
        lock = handler.lock  # who is stuck in a write of their own may hold it for ever
        if not self._pieces or not (lock is None or lock.acquire(timeout=patience)):
            return
        try:
            handler.stream.flush()
            pipe = self._pipe_of(handler.stream)
            if pipe is None:
                self._write_text(handler.stream)
            else:
                self._write_pipe(pipe, patience)
        except (OSError, ValueError):  # gone, full, or closed: a log line is no reason to fail
            self._drop()
        finally:
            handler.release()

    def lost(self, lines: int) -> None:
        """Count lines that will not be written."""
        self.dropped += lines
        self.unreported += lines

    def close(self) -> None:
        """Drop what still waits. It may be used again."""
        self._drop()
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None

    def __del__(self) -> None:
        self.close()

    def _write_text(self, stream: TextIO) -> None:
        """A file or a text in memory: takes everything at once."""
        encoding = stream.encoding or "utf-8"
        text = b"".join(self._pieces).decode().encode(encoding, "backslashreplace").decode(encoding)
        stream.write(text)
        stream.flush()
        self._pieces.clear()
        self._held = 0

    def _write_pipe(self, pipe: "_Pipe", patience: float) -> None:
        while self._pieces:
            piece = self._pieces[0]
            written = pipe.write(piece, patience)
            if not written:
                return
            patience = 0.0
            self._held -= written
            if written == len(piece):
                self._pieces.popleft()
            else:
                self._pieces[0] = piece[written:]

    def _pipe_of(self, stream: TextIO) -> "_Pipe | None":
        """The way to a stream whose reader may be slow: pipe, socket, terminal. None for all others."""
        try:
            descriptor = stream.fileno()
        except (OSError, ValueError, AttributeError):
            return None
        found = os.fstat(descriptor)
        if not (stat.S_ISFIFO(found.st_mode) or stat.S_ISSOCK(found.st_mode) or stat.S_ISCHR(found.st_mode)):
            return None
        identity = (descriptor, found.st_dev, found.st_ino)
        if self._pipe is None or self._pipe.identity != identity:
            if self._pipe is not None:
                self._pipe.close()
            self._pipe = _Pipe(descriptor, identity, is_socket=stat.S_ISSOCK(found.st_mode))
        return self._pipe

    def _drop(self) -> None:
        for piece in self._pieces:
            self.lost(piece.count(b"\n"))
        self._pieces.clear()
        self._held = 0


class _Pipe:
    """A descriptor that is shared with others, who may rely on its blocking, written without blocking."""

    __slots__ = ("_descriptor", "_own", "_ready", "_socket", "identity")

    def __init__(self, descriptor: int, identity: tuple[int, int, int], *, is_socket: bool) -> None:
        self.identity = identity
        self._descriptor = descriptor
        self._own = -1
        self._socket: socket.socket | None = None
        if is_socket:
            self._socket = socket.socket(fileno=os.dup(descriptor))
        else:
            # Opened again it has flags of its own. Where that is impossible the next best is to ask before each write.
            with suppress(OSError):
                self._own = os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        self._ready = select.poll()
        self._ready.register(descriptor, select.POLLOUT)

    def write(self, piece: bytes, patience: float) -> int:
        """How many bytes were taken; 0 if there is no room within `patience` seconds. Raises `OSError` if nobody can read it."""
        if (patience or self._own < 0) and not self._ready.poll(patience * 1000):
            return 0
        try:
            if self._socket is not None:
                return self._socket.send(piece, socket.MSG_DONTWAIT)
            return os.write(self._own if self._own >= 0 else self._descriptor, piece)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        elif self._own >= 0:
            os.close(self._own)
            self._own = -1
