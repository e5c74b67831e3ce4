"""The inputs of a bidirectional request at the worker: who may have them, and what ends them."""

from collections.abc import AsyncIterator
from typing import Any

from stator.errors import Cancelled, EngineError
from stator.protocol.envelope import IncomingRequest
from stator.runtime.context import Context
from stator.transports.inputs import InputStream

__all__ = ["check_kind", "end_with", "only_input"]


def check_kind(request: IncomingRequest, *, bidirectional: bool, endpoint: str) -> None:
    """Raises `EngineError` (InvalidArgument) for a request of the other kind than its handler."""
    if request.streams_in and not bidirectional:
        raise EngineError(
            f"endpoint {endpoint} takes one request, this is a bidirectional one; call it with generate()",
            kind="InvalidArgument",
        )
    if bidirectional and not request.streams_in:
        raise EngineError(
            f"endpoint {endpoint} is bidirectional, this is a single request; call it with converse()", kind="InvalidArgument"
        )


def end_with(context: Context, inputs: InputStream) -> None:
    """Stopping a request ends its inputs, without an error; killing it ends them with `Cancelled`."""
    context.subscribe(lambda killed: _end(inputs, killed=killed))


def _end(inputs: InputStream, *, killed: bool) -> None:
    inputs.finish(Cancelled("killed by the caller") if killed else None)


async def only_input(value: Any) -> AsyncIterator[Any]:
    """Inputs that are this value and no other, as the canary's are."""
    yield value
