"""Whose request it is, and how urgent: what admission needs to know, from the headers and the body."""

from collections.abc import Mapping
from hashlib import blake2b

import msgspec

from stator.frontend.errors import Failure, Rejected
from stator.frontend.permit import Priority

__all__ = ["PRIORITY_HEADER", "Caller", "caller_of", "tenant_of"]

PRIORITY_HEADER = "x-stator-priority"
_KEY_HEADERS = ("Authorization", "api-key", "x-api-key")
"""where clients put their key: OpenAI's, Azure's, Anthropic's"""
_SCHEME = "bearer "
_BY_NAME = {priority.label: priority for priority in Priority}
_BY_TIER = {"priority": Priority.HIGH, "flex": Priority.LOW}
"""OpenAI's `service_tier`; all other values are normal"""


class Caller(msgspec.Struct, frozen=True):
    """`tenant` is "" for requests without a key."""

    tenant: str
    priority: Priority


def caller_of(headers: Mapping[str, str], tier: str | None, *, salt: bytes, priorities: bool) -> Caller:
    """The caller of a request. `tier` is its `service_tier`; the header wins. Without `priorities` neither counts.

    Raises `Rejected` with 400 for a priority that does not exist.
    """
    priority = _priority(headers.get(PRIORITY_HEADER), tier) if priorities else Priority.NORMAL
    return Caller(tenant_of(headers, salt), priority)


def _priority(given: str | None, tier: str | None) -> Priority:
    if given is None:
        return Priority.NORMAL if tier is None else _BY_TIER.get(tier, Priority.NORMAL)
    priority = _BY_NAME.get(given.strip().lower())
    if priority is None:
        text = f"Invalid header '{PRIORITY_HEADER}': expected one of {', '.join(_BY_NAME)}, got {given[:32]!r}."
        raise Rejected(Failure(status=400, message=text, param=PRIORITY_HEADER, code="invalid_priority"))
    return priority


def tenant_of(headers: Mapping[str, str], salt: bytes) -> str:
    """The tenant by its API key: a hash of it, of no use outside this process. The key itself is kept nowhere."""
    for header in _KEY_HEADERS:
        key = headers.get(header)
        if key:
            if key[: len(_SCHEME)].lower() == _SCHEME:
                key = key[len(_SCHEME) :]
            return blake2b(key.strip().encode("utf-8", "surrogateescape"), digest_size=16, key=salt).hexdigest()
    return ""
