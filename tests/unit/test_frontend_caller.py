"""Who asks, and how urgently."""

import pytest
from multidict import CIMultiDict

from stator.frontend.caller import caller_of, tenant_of
from stator.frontend.errors import Rejected
from stator.frontend.permit import Priority

SALT = b"0123456789abcdef"


def priority(headers: dict[str, str], tier: str | None = None, *, priorities: bool = True) -> Priority:
    return caller_of(CIMultiDict(headers), tier, salt=SALT, priorities=priorities).priority


@pytest.mark.parametrize(
    ("tier", "expected"),
    [
        (None, Priority.NORMAL),
        ("auto", Priority.NORMAL),
        ("default", Priority.NORMAL),
        ("scale", Priority.NORMAL),
        ("priority", Priority.HIGH),
        ("flex", Priority.LOW),
    ],
)
def test_the_service_tier_is_a_priority(tier: str | None, expected: Priority) -> None:
    assert priority({}, tier) is expected


def test_the_header_wins_in_any_spelling() -> None:
    assert priority({"X-Stator-Priority": " High "}, "flex") is Priority.HIGH
    assert priority({"x-stator-priority": "low"}) is Priority.LOW
    assert priority({"x-stator-priority": "normal"}, "priority") is Priority.NORMAL


@pytest.mark.parametrize("bad", ["urgent", "", "0", "x" * 10_000])
def test_another_priority_is_refused_and_the_allowed_ones_are_named(bad: str) -> None:
    with pytest.raises(Rejected) as raised:
        priority({"x-stator-priority": bad})
    failure = raised.value.failure
    assert (failure.status, failure.param, failure.code) == (400, "x-stator-priority", "invalid_priority")
    assert "high, normal, low" in failure.message
    assert len(failure.message) < 200


def test_where_priorities_are_off_nobody_has_one() -> None:
    assert priority({"x-stator-priority": "high"}, "priority", priorities=False) is Priority.NORMAL
    assert priority({"x-stator-priority": "nonsense"}, priorities=False) is Priority.NORMAL


def test_the_tenant_is_the_key_wherever_it_stands() -> None:
    same = [
        {"Authorization": "Bearer sk-secret"},
        {"authorization": "bearer  sk-secret "},
        {"api-key": "sk-secret"},
        {"X-API-Key": "sk-secret"},
    ]
    tenants = {tenant_of(CIMultiDict(headers), SALT) for headers in same}
    assert len(tenants) == 1
    assert tenant_of(CIMultiDict({"api-key": "sk-other"}), SALT) not in tenants
    assert tenant_of(CIMultiDict(), SALT) == tenant_of(CIMultiDict({"Authorization": ""}), SALT) == ""


def test_the_key_itself_is_not_kept() -> None:
    tenant = tenant_of({"Authorization": "Bearer sk-secret"}, SALT)
    assert "secret" not in tenant
    assert len(tenant) == 32
    assert tenant != tenant_of({"Authorization": "Bearer sk-secret"}, b"another process!")
    assert tenant_of({"Authorization": "Bearer \udcff\udc80"}, SALT)
