"""Noticing that a file changed, by looking: it works on every file system, through links, and for files that are replaced."""

import asyncio
import os
from pathlib import Path

__all__ = ["FileWatch"]

_INTERVAL = 0.4
"""seconds between two looks; a change is told after two at most"""


class FileWatch:
    """One file. Looks happen in a thread: a slow disk stops nobody."""

    def __init__(self, path: Path, *, interval: float = _INTERVAL) -> None:
        self._path = path
        self._interval = interval
        self._known: tuple[int, ...] | None = None

    async def mark(self) -> None:
        """The file is about to be read as it is now."""
        self._known = await asyncio.to_thread(_identity, self._path)

    async def changed(self) -> None:
        """Return when it is no longer as last marked or told, and stood still between two looks: who writes may finish."""
        before = self._known
        while True:
            await asyncio.sleep(self._interval)
            now = await asyncio.to_thread(_identity, self._path)
            if now == before and now != self._known:
                self._known = now
                return
            before = now


def _identity(path: Path) -> tuple[int, ...] | None:
    """What is different when the file is; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_mode
