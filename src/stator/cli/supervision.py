"""What a child process and its supervisor tell each other: news as lines on standard output, life by standard input.

A line of news is a mark, a kind and a text; lines without the mark (libraries print what they like) count as progress.
"""

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from enum import StrEnum

import msgspec

__all__ = ["News", "NewsKind", "ended_with_supervisor", "read_news", "tell"]

_MARK = "::stator::"
_LONGEST = 2000
"""characters of a line that are shown"""


class NewsKind(StrEnum):
    """What a child has to say."""

    PROGRESS = "progress"
    """what a start is waiting for"""
    READY = "ready"
    """it serves; the text says what: a model's name, an address"""
    FAILED = "failed"
    """it cannot start and will end; the text says why"""


class News(msgspec.Struct, frozen=True, kw_only=True):
    """One line from a child."""

    kind: NewsKind
    text: str


def tell(kind: NewsKind, text: str) -> None:
    """Send news to the supervisor; nothing happens if it is gone."""
    line = f"{_MARK}{kind}::{' '.join(text.split())[:_LONGEST]}\n"
    with suppress(OSError):
        os.write(sys.stdout.fileno(), line.encode(errors="replace"))


async def read_news(stream: asyncio.StreamReader) -> AsyncGenerator[News, None]:
    """The lines of a child until it closes its end; whatever it prints, no line is longer than 2000 characters."""
    pending = b""
    while chunk := await stream.read(1 << 16):
        *lines, pending = (pending + chunk).split(b"\n")
        pending = pending[: 4 * _LONGEST]
        for line in lines:
            if news := _news(line):
                yield news
    if news := _news(pending):
        yield news


def _news(line: bytes) -> News | None:
    text = line.decode(errors="replace").strip()
    if not text.startswith(_MARK):
        return News(kind=NewsKind.PROGRESS, text=text[:_LONGEST]) if text else None
    kind, _, text = text.removeprefix(_MARK).partition("::")
    try:
        return News(kind=NewsKind(kind), text=text)
    except ValueError:
        return None


async def ended_with_supervisor(end: Callable[[], None]) -> None:
    """Call `end` when the supervisor is gone, however it went: its end of our standard input closes then."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    try:
        while await reader.read(1024):
            pass
    finally:
        transport.close()
    end()
