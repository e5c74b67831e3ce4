"""The answer to a call."""

import asyncio
from typing import Any

import msgspec

from stator.dynamo.annotated import annotated
from stator.dynamo.errors import stream_failed
from stator.errors import StatorError
from stator.protocol.annotated import Annotated as WireAnnotated
from stator.runtime import ResponseStream

__all__ = ["AsyncResponseStream"]


class AsyncResponseStream:
    """Yields `Annotated` items, or plain ones. Errors are raised as `ValueError`, after the items before them; then it is at its end.

    Dropping it kills the request at its worker.
    """

    __slots__ = ("_annotated", "_failure", "_loop", "_over", "_stream")

    def __init__(self, stream: ResponseStream, *, annotated: bool, failure: StatorError | None = None) -> None:
        """`failure` is the error with which `stream` ended already, before its first item."""
        self._stream = stream
        self._annotated = annotated
        self._loop = asyncio.get_running_loop()
        self._failure = failure
        self._over = False

    def __del__(self) -> None:
        """A context that outlives this object holds Stator's stream, so it is told. Any thread may get here."""
        if not self._over and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._stream.kill)

    def __aiter__(self) -> "AsyncResponseStream":
        return self

    async def __anext__(self) -> Any:
        """Token path. Cancelled: nothing was taken."""
        if self._over:
            raise StopAsyncIteration("Stream exhausted")
        failure, self._failure = self._failure, None
        if failure is not None:
            self._over = True
            raise stream_failed(failure) from failure
        following = self._stream.__anext__
        try:
            while True:
                item = await following()
                if self._annotated:
                    return annotated(item)
                if type(item) is WireAnnotated:
                    item = None if item.data is msgspec.UNSET else item.data
                if item is not None:  # an annotation alone, or null: the reference skips both
                    return item
        except StopAsyncIteration:
            self._over = True
            raise StopAsyncIteration("Stream exhausted") from None
        except StatorError as error:
            self._over = True
            raise stream_failed(error) from error
