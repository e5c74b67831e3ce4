"""What a user of the reference may serve, as Stator's runtime calls it."""

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from stator.dynamo.context import Context
from stator.dynamo.exceptions import EngineShutdown, HttpError, InvalidArgument
from stator.dynamo.request_stream import PyAsyncRequestStream
from stator.errors import EngineError
from stator.protocol.stream import Phase
from stator.protocol.wire_errors import engine_error
from stator.runtime import Context as StatorContext

__all__ = ["bidirectional", "unary"]

Generate = Callable[[Any, StatorContext], AsyncIterator[Any]]


def unary(handler: Any) -> Generate:
    """`handler(request)`, or `handler(request, context=…)` if it has a parameter of that name, as `(request, context)`.

    What it returns must have `__anext__`; async generators have. Whatever is wrong with a handler is told to its callers: as in the
    reference, it is served nevertheless.
    """
    wants_context = _wants_context(handler)

    def generate(request: Any, context: StatorContext) -> AsyncIterator[Any]:
        try:
            answer = handler(request, context=Context.of(context)) if wants_context else handler(request)
            _check(answer)
        except Exception as error:
            raise _not_called(error) from error
        return _items(answer)

    return generate


def bidirectional(handler: Any) -> Generate:
    """The same for a handler of inputs that come while it answers."""
    call = unary(handler)

    def generate(inputs: Any, context: StatorContext) -> AsyncIterator[Any]:
        return call(PyAsyncRequestStream(inputs), context)

    return generate


def _wants_context(handler: Any) -> bool:
    try:
        return "context" in inspect.signature(handler).parameters
    except (TypeError, ValueError):
        return False


def _check(answer: Any) -> None:
    if not hasattr(answer, "__anext__"):
        if inspect.iscoroutine(answer):
            answer.close()
        raise AttributeError(f"'{type(answer).__name__}' object has no attribute '__anext__'")


def _not_called(error: Exception) -> EngineError:
    """A handler that could not be called: its caller's call fails, as opposed to its stream. The phase says so on the native plane."""
    known = engine_error(error)
    kind = known.kind if isinstance(known, EngineError) else "Unknown"
    return EngineError(f"{type(error).__name__}: {error}", kind=kind, phase=Phase.PROLOGUE.label)


async def _items(answer: Any) -> AsyncIterator[Any]:
    """The items, with the handler's errors as Stator says them. Token path."""
    following = answer.__anext__
    try:
        while True:
            try:
                item = await following()
            except StopAsyncIteration:
                return
            except GeneratorExit as error:
                raise EngineShutdown("engine shutting down") from error
            except HttpError as error:
                text = msgspec.json.encode({"message": error.message, "code": error.code}).decode()
                raise InvalidArgument(text) from error
            yield item
    finally:
        close = getattr(answer, "aclose", None)
        if close is not None:
            await close()
