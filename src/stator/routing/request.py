"""What a request says about where it wants to go."""

from collections.abc import Set as AbstractSet

import msgspec

__all__ = ["ANYWHERE", "RouteRequest"]


class RouteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Facts of one request; a room above may subclass it and add what its own policy needs.

    `target` is the only instance it may go to. `excluded` holds those already tried: they are not given another chance.
    """

    target: int | None = None
    excluded: AbstractSet[int] = frozenset()


ANYWHERE = RouteRequest()
"""the request without wishes: nearly all of them"""
