"""What a child process and its supervisor tell each other: progress as lines on standard output, life by standard input."""

import asyncio
import sys
from collections.abc import Callable

__all__ = ["ended_with_supervisor", "progress_line"]


def progress_line(text: str) -> None:
    """Say in a few words what is going on; the supervisor shows it."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


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
