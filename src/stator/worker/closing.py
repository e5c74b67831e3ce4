"""Ending a stream early, whatever kind of iterator it is."""

from collections.abc import AsyncIterator
from typing import Any

__all__ = ["close_stream"]


async def close_stream(stream: AsyncIterator[Any]) -> None:
    """Run the clean-up of a generator; nothing if it has ended or is no generator."""
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()
