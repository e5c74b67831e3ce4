"""Being told by the kernel what happens in a directory: Linux' inotify, through libc."""

import ctypes
import errno
import os
import struct
from typing import Self

import msgspec

__all__ = ["FileEvent", "Inotify"]

_MODIFIED_NAMES = 0x0080 | 0x0100 | 0x0040 | 0x0200  # moved to, create; moved from, delete
_APPEARED = 0x0080 | 0x0100
_WATCHED_ITSELF = 0x0400 | 0x0800  # delete self, move self
_GONE = _WATCHED_ITSELF | 0x2000 | 0x8000  # … unmounted, watch removed
_OVERFLOW = 0x4000
_ONLY_DIRECTORY = 0x01000000
_HEADER = struct.Struct("iIII")


class FileEvent(msgspec.Struct, frozen=True):
    """What happened. Exactly one of the flags, or none: the name is gone from the directory."""

    watch: int
    """as returned by `Inotify.add`; -1 for an overflow"""
    name: str
    appeared: bool
    """a complete file was linked or renamed to `name`, or one was created and is about to be written"""
    lost: bool
    """the directory itself is deleted, moved away or unmounted"""
    overflow: bool
    """events were dropped, in any directory"""


class Inotify:
    """One inotify descriptor, non-blocking. Raises OSError where the kernel or its limits say no."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        try:
            self._fd = self._checked(self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))
        except AttributeError as error:
            raise OSError(errno.ENOSYS, "this system has no inotify") from error

    def fileno(self) -> int:
        """Readable when events wait."""
        return self._fd

    def add(self, directory: str) -> int:
        """Report names that come and go in `directory`. The answer is the same for the same directory."""
        mask = _MODIFIED_NAMES | _WATCHED_ITSELF | _ONLY_DIRECTORY
        return self._checked(self._libc.inotify_add_watch(self._fd, os.fsencode(directory), ctypes.c_uint32(mask)))

    def remove(self, watch: int) -> None:
        """Stop reporting. Harmless when the kernel has removed the watch itself."""
        self._libc.inotify_rm_watch(self._fd, watch)

    def read(self) -> list[FileEvent]:
        """Everything that waits, in order."""
        events: list[FileEvent] = []
        while True:
            try:
                data = os.read(self._fd, 65536)
            except BlockingIOError:
                return events
            events.extend(_parse(data))

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _checked(result: int) -> int:
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        return result


def _parse(data: bytes) -> list[FileEvent]:
    events: list[FileEvent] = []
    at = 0
    while at < len(data):
        watch, mask, _, length = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        name = os.fsdecode(data[at : at + length].rstrip(b"\0"))
        at += length
        events.append(
            FileEvent(
                watch=watch,
                name=name,
                appeared=bool(mask & _APPEARED),
                lost=bool(mask & _GONE),
                overflow=bool(mask & _OVERFLOW),
            )
        )
    return events
