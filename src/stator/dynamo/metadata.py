"""The string map that goes along with a request."""

from collections.abc import Iterator, MutableMapping
from typing import Any, cast

import msgspec

from stator.dynamo.errors import InvalidType

__all__ = ["ContextMetadata", "strings"]

_MISSING: Any = object()


class ContextMetadata(MutableMapping[str, str]):
    """A live view of a context's metadata: what is written here is sent with the next call. Texts only; keys come sorted."""

    __slots__ = ("_values",)

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values

    def __repr__(self) -> str:
        return msgspec.json.format(msgspec.json.encode(dict(self.items())), indent=0).decode()

    def __getitem__(self, key: str) -> str:
        return self._values[_text("key", key)]

    def __setitem__(self, key: str, value: str) -> None:
        self._values[_text("key", key)] = _text("value", value)

    def __delitem__(self, key: str) -> None:
        del self._values[_text("key", key)]

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return _text("key", key) in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._values))

    # The reference answers with lists, and takes no default that is no text.

    def get(self, key: str, default: Any = None) -> Any:
        """The value at `key`, or `default`."""
        if default is not None:
            _text("default", default)
        return self._values.get(_text("key", key), default)

    def pop(self, key: str, default: Any = _MISSING) -> Any:
        """Take `key` out. Raises `KeyError` when it is not there and no default is given; None is no default."""
        if default is _MISSING or default is None:
            return self._values.pop(_text("key", key))
        return self._values.pop(_text("key", key), _text("default", default))

    def keys(self) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]: the reference's type
        """All keys, sorted."""
        return sorted(self._values)

    def values(self) -> list[str]:  # pyright: ignore[reportIncompatibleMethodOverride]: the reference's type
        """The values, in the order of the keys."""
        return [self._values[key] for key in sorted(self._values)]

    def items(self) -> list[tuple[str, str]]:  # pyright: ignore[reportIncompatibleMethodOverride]: the reference's type
        """Pairs, in the order of the keys."""
        return sorted(self._values.items())

    def clear(self) -> None:
        """Empty it."""
        self._values.clear()

    def copy(self) -> dict[str, str]:
        """A copy that is not sent."""
        return dict(self.items())


def strings(value: Any) -> dict[str, str]:
    """A copy of a map of texts. Raises `InvalidType` for anything else."""
    if isinstance(value, ContextMetadata):
        return value.copy()
    if not isinstance(value, dict):
        raise InvalidType(f"metadata must be a dict of texts, not {type(value).__name__}")
    return {_text("key", key): _text("value", item) for key, item in cast("dict[object, object]", value).items()}


def _text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidType(f"a {what} of metadata must be a text, not {type(value).__name__}")
    return value
