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
"""an async generator function of `(request)` or `(request, context)`; a second parameter with a default counts only if it has that name"""


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
    if not _accepts(getattr(last, "generate", None), 2):
        raise UsageError(f"the last stage of a pipeline must have generate(request, context), got {last!r}")
    engine: Any = last
    for operator in reversed(operators):
        if not _accepts(getattr(operator, "generate", None), 3):
            raise UsageError(f"{operator!r} is no operator: it needs generate(request, next, context)")
        engine = _Linked(operator, engine)  # pyright: ignore[reportArgumentType]  # the parameters were checked above
    return engine


def generate_function(handler: Handler | Engine) -> Generate:
    """Bring what a user may serve to one form. Raises `UsageError` for anything that is not an async generator or engine."""
    function: Any = getattr(handler, "generate", handler)
    code: Any = getattr(function, "__call__", None)  # noqa: B004  # where an object has its code
    if code is None:
        raise UsageError(f"cannot serve {handler!r}: expected an async generator function or an object with generate()")
    for each in (function, code):
        if inspect.iscoroutinefunction(each) or inspect.isgeneratorfunction(each):
            raise UsageError(f"{function!r} is no async generator; a handler must yield its items (async def with yield)")
    if _accepts(function, 2) and _wants_context(function):
        return function
    if _accepts(function, 1):
        return lambda request, context: function(request)
    raise UsageError(f"{function!r} cannot be called with (request) or (request, context)")


def _wants_context(function: Callable[..., Any]) -> bool:
    """Whether the second argument is meant for the context: not if it has a default and another name, as bound loop variables have."""
    try:
        second = list(inspect.signature(function).parameters.values())[1:2]
    except ValueError:
        return True
    return not second or second[0].default is inspect.Parameter.empty or second[0].name in ("context", "_context")


def _accepts(function: Any, count: int) -> bool:
    """Whether `function` can be called with `count` positional arguments, as far as can be told."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a function without signature: it will say so itself
        return True
    return True
