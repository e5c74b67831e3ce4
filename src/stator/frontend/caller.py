"""Whose request it is, and how urgent: what admission needs to know, from the headers and the body."""

from collections.abc import Mapping
from hashlib import blake2b

import msgspec

from stator.frontend.errors import Failure, Rejected
from stator.frontend.key_account import KeyAccount
from stator.frontend.permit import Priority
from stator.frontend.presented_key import presented_key

__all__ = ["PRIORITY_HEADER", "Caller", "caller_of", "tenant_of"]

PRIORITY_HEADER = "x-stator-priority"
_BY_NAME = {priority.label: priority for priority in Priority}
_BY_TIER = {"priority": Priority.HIGH, "flex": Priority.LOW}
"""OpenAI's `service_tier`; all other values are normal"""


class Caller(msgspec.Struct, frozen=True):
    """`tenant` is "" for requests without a key."""

    tenant: str
    priority: Priority


def caller_of(
    headers: Mapping[str, str], tier: str | None, *, salt: bytes, priorities: bool, account: KeyAccount | None = None
) -> Caller:
    """The caller of a request. `tier` is its `service_tier`; the header wins. Without `priorities` neither counts.

    `account` is that of its API key where keys are asked for: it is the tenant then, and says which priorities are allowed.
    Raises `Rejected` with 400 for a priority that does not exist, 403 for one that the key does not allow.
    """
    given = headers.get(PRIORITY_HEADER) if priorities else None
    if account is None:
        return Caller(tenant_of(headers, salt), _priority(given, tier if priorities else None, Priority.NORMAL))
    allowed = account.record.priorities or tuple(Priority)
    usual = account.record.priorities[0] if account.record.priorities else Priority.NORMAL
    priority = _priority(given, tier if priorities else None, usual)
    if priority not in allowed:
        if given is not None:
            text = f"The API key `{account.name}` does not allow the priority {priority.label}."
            raise account.forbidden("priority", text, param=PRIORITY_HEADER, code="priority_not_allowed")
        priority = usual
    return Caller(account.name, priority)


def _priority(given: str | None, tier: str | None, usual: Priority) -> Priority:
    """What the header says, else the tier; `usual` if neither says anything."""
    if given is None:
        return usual if tier is None else _BY_TIER.get(tier, usual)
    priority = _BY_NAME.get(given.strip().lower())
    if priority is None:
        text = f"Invalid header '{PRIORITY_HEADER}': expected one of {', '.join(_BY_NAME)}, got {given[:32]!r}."
        raise Rejected(Failure(status=400, message=text, param=PRIORITY_HEADER, code="invalid_priority"))
    return priority


def tenant_of(headers: Mapping[str, str], salt: bytes) -> str:
    """The tenant by its API key: a hash of it, of no use outside this process. The key itself is kept nowhere."""
    key = presented_key(headers)
    if not key:
        return ""
    return blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16, key=salt).hexdigest()
