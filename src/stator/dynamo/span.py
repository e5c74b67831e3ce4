"""Spans as the reference's engines write them. They are checked and not exported: `stator[otel]` exports the request's own span."""

from typing import Any, Literal

from stator.dynamo.errors import InvalidValue

__all__ = ["SpanProxy"]


class SpanProxy:
    """A span that is not recorded, like the reference's where no exporter is set up."""

    __slots__ = ()

    def set_attribute(self, key: str, value: Any) -> None:
        """Nothing is kept."""

    def add_event(self, name: str, attrs: dict[str, Any] | None = None) -> None:
        """Nothing is kept."""

    def set_status(self, status: str, description: str | None = None) -> None:
        """Raises `ValueError` for anything but `ok` and `error`."""
        if status not in ("ok", "error"):
            raise InvalidValue(f'set_status: expected "ok" or "error", got "{status}"')

    def close(self) -> None:
        """Idempotent."""

    def __enter__(self) -> "SpanProxy":
        return self

    def __exit__(self, exc_type: Any = None, exc_value: Any = None, traceback: Any = None) -> Literal[False]:
        return False
