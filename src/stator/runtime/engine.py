"""Anything that answers requests: handlers, engines, operators and the pipelines they form."""

import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol, runtime_checkable

from stator.errors import UsageError
from stator.runtime.context import Context

__all__ = ["Engine", "Generate", "Handler", "Operator", "generate_function", "pipeline"]

Generate = Callable[[Any, Context], AsyncIterator[Any]]
"""`(request, context)` → items"""

Handler = Callable[..., AsyncIterator[Any]]
"""an async generator function of `(request)` or `(request, context)`"""


@runtime_checkable
class Engine(Protocol):
    """Anything with `generate`. A pipeline is one, a client is one, an LLM engine is one with a life cycle."""

    def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        """Answer `request`. Raise before the first item for a clean refusal; the caller may retry elsewhere."""
        ...


@runtime_checkable
class Operator(Protocol):
    """Wraps an engine: may change the request on the way in and the items on the way out, or call `next` more than once."""

    def generate(self, request: Any, next: Engine, context: Context) -> AsyncIterator[Any]: ...


class _Linked:
    """An operator bound to the engine behind it."""

    __slots__ = ("_next", "_operator")

    def __init__(self, operator: Operator, next: Engine) -> None:
        self._operator = operator
        self._next = next

    def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        return self._operator.generate(request, self._next, context)


def pipeline(*stages: Operator | Engine) -> Engine:
    """Link operators in the order a request meets them; the last stage is an engine. The result is an engine.

    Raises `UsageError` if there is no stage or a stage in the wrong place.
    """
    if not stages:
        raise UsageError("a pipeline needs at least an engine as its last stage")
    *operators, last = stages
    if not callable(getattr(last, "generate", None)):
        raise UsageError(f"the last stage of a pipeline must have generate(request, context), got {last!r}")
    engine: Any = last
    for operator in reversed(operators):
        if not callable(getattr(operator, "generate", None)) or _parameters(operator.generate) < 3:
            raise UsageError(f"{operator!r} is no operator: it needs generate(request, next, context)")
        engine = _Linked(operator, engine)  # pyright: ignore[reportArgumentType]  # the parameter count was checked above
    return engine


def generate_function(handler: Handler | Engine) -> Generate:
    """Bring what a user may serve to one form. Raises `UsageError` for anything that is not an async generator or engine."""
    function: Any = getattr(handler, "generate", handler)
    if not callable(function):
        raise UsageError(f"cannot serve {handler!r}: expected an async generator function or an object with generate()")
    if inspect.iscoroutinefunction(function):
        raise UsageError(f"{function!r} is a coroutine function; a handler must yield its items (async def with yield)")
    count = _parameters(function)
    if count == 1:
        return lambda request, context: function(request)
    if count < 1:
        raise UsageError(f"{function!r} takes no request; a handler takes (request) or (request, context)")
    return function


def _parameters(function: Callable[..., Any]) -> int:
    """How many positional arguments `function` takes, as far as can be told; 2 when it cannot."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return 2
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return 3
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
