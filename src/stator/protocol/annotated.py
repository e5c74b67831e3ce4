"""An item that carries more than its value."""

from typing import Any

import msgspec

__all__ = ["Annotated"]


class Annotated(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A value with its annotations (`spec/10 §3.3`). Handlers may yield it; readers get it only where an annotation is set.

    A plain item is the value itself, on every plane: yielding `v` and `Annotated(data=v)` is the same.
    """

    data: Any = msgspec.UNSET
    """the value; UNSET for an annotation alone"""
    id: str | msgspec.UnsetType = msgspec.UNSET
    event: str | msgspec.UnsetType = msgspec.UNSET
    comment: list[str] | msgspec.UnsetType = msgspec.UNSET
