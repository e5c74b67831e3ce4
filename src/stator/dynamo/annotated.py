"""An item with what was said about it."""

from typing import Any

import msgspec

from stator.protocol.annotated import Annotated as WireAnnotated

__all__ = ["Annotated", "annotated"]


class Annotated:
    """What the streams of a client yield unless they were asked for plain items: the value and its annotations, through methods."""

    __slots__ = ("_comments", "_data", "_event", "_id")

    def __init__(self, data: Any) -> None:
        self._data = data
        self._event: str | None = None
        self._comments: list[str] | None = None
        self._id: str | None = None

    def __repr__(self) -> str:
        return f"Annotated(data={self._data!r}, event={self._event!r}, comment={self._comments or []!r}, id={self._id!r})"

    def data(self) -> Any:
        """The value the handler yielded; None for an annotation alone."""
        return self._data

    def event(self) -> str | None:
        """The name of an event."""
        return self._event

    def comments(self) -> list[str] | None:
        """Texts beside the value."""
        return self._comments

    def id(self) -> str | None:
        """The item's own id."""
        return self._id

    def is_error(self) -> bool:
        """Whether this is an error. Errors are raised, so what a stream yields never is."""
        return self._event == "error"


def annotated(item: Any) -> Annotated:
    """An item as Stator's streams have it, in the reference's form. Token path."""
    if type(item) is not WireAnnotated:
        return Annotated(item)
    made = Annotated(None if item.data is msgspec.UNSET else item.data)
    made._event = None if item.event is msgspec.UNSET else item.event  # pyright: ignore[reportPrivateUsage]: the reference's constructor takes the value alone
    made._comments = None if item.comment is msgspec.UNSET else item.comment  # pyright: ignore[reportPrivateUsage]
    made._id = None if item.id is msgspec.UNSET else item.id  # pyright: ignore[reportPrivateUsage]
    return made
