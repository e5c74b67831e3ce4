"""The inputs of a bidirectional request."""

from collections.abc import AsyncIterator
from typing import Any

__all__ = ["PyAsyncRequestStream"]


class PyAsyncRequestStream:
    """What a bidirectional handler reads from. Its end says that no more input comes; the answer goes on."""

    __slots__ = ("_inputs",)

    def __init__(self, inputs: AsyncIterator[Any]) -> None:
        self._inputs = aiter(inputs)

    def __aiter__(self) -> "PyAsyncRequestStream":
        return self

    async def __anext__(self) -> Any:
        return await anext(self._inputs)
