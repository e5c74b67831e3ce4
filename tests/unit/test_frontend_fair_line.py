"""The order of waiting calls is fair between tenants, whatever each of them sends."""

import pytest

from stator.frontend.fair_line import CREDIT, FairLine
from stator.frontend.permit import CallGroup, Permit, Priority


def wait(line: FairLine, tenant: str, calls: int = 1) -> list[Permit]:
    group = CallGroup(tenant, Priority.NORMAL, 0.0)
    permits = [Permit(group) for _ in range(calls)]
    for permit in permits:
        line.add(permit)
    return permits


def order(line: FairLine, calls: int = 1000) -> str:
    return "".join(line.take().group.tenant for _ in range(min(calls, line.waiting)))


def test_one_tenant_is_first_come_first_served() -> None:
    line = FairLine(8)
    permits = wait(line, "a", 4)
    assert [line.take() for _ in range(4)] == permits
    assert (line.waiting, line.tenants, line.known) == (0, 0, 1)


def test_tenants_take_turns_however_many_calls_each_has() -> None:
    line = FairLine(8)
    wait(line, "a", 6)
    wait(line, "b", 2)
    wait(line, "c", 3)
    assert order(line) == "abcabcacaaa"


def test_who_used_less_while_nobody_waited_goes_first_until_even() -> None:
    line = FairLine(8)
    line.charge("b", 1)
    line.charge("a", 10)
    wait(line, "a", 20)
    wait(line, "b", 20)
    assert line.is_owed("b") is False, "20 wait already"
    assert order(line, 15) == "b" * 9 + "ab" * 3


def test_what_one_may_save_up_is_bounded() -> None:
    line = FairLine(8)
    line.charge("b", 1)
    line.charge("a", 10_000)
    wait(line, "a", 3 * CREDIT)
    wait(line, "b", 3 * CREDIT)
    first = order(line, 2 * CREDIT)
    assert first.startswith("b" * CREDIT)
    assert first[CREDIT + 1 :].count("a") == pytest.approx(CREDIT / 2, abs=1)


def test_a_new_name_brings_no_advantage() -> None:
    line = FairLine(8)
    line.charge("a", 100)
    assert not line.is_owed("new")
    wait(line, "a", 4)
    wait(line, "new", 4)
    assert order(line) in ("newanewanewanewa", "anewanewanewanew")


def test_the_position_is_when_one_would_be_served() -> None:
    line = FairLine(8)
    line.charge("b", 3)
    line.charge("a", 5)
    wait(line, "a", 3)
    wait(line, "b", 4)
    wait(line, "c", 1)
    for tenant in "abcd":
        expected = line.position(tenant)
        other = FairLine(8)
        other.charge("b", 3)
        other.charge("a", 5)
        wait(other, "a", 3)
        wait(other, "b", 4)
        wait(other, "c", 1)
        (mine,) = wait(other, tenant)
        taken = [other.take() for _ in range(other.waiting)]
        assert taken.index(mine) + 1 == expected, tenant


def test_who_leaves_is_not_charged_and_costs_nobody_a_turn() -> None:
    line = FairLine(8)
    first, second = wait(line, "a", 2)
    wait(line, "b", 1)
    line.remove(first)
    assert [line.take(), line.take().group.tenant] == [second, "b"]
    wait(line, "a", 1)
    wait(line, "b", 1)
    assert order(line) == "ab", "each was served once"
    assert line.waiting == 0


def test_who_is_put_back_is_first_of_its_tenant_and_not_charged_twice() -> None:
    line = FairLine(8)
    wait(line, "a", 2)
    permit = line.take()
    line.put_back(permit)
    wait(line, "b", 1)
    assert line.take() is permit
    assert order(line) == "ba"


def test_few_idle_tenants_are_remembered_and_all_that_wait() -> None:
    line = FairLine(2)
    for tenant in "abcdef":
        wait(line, tenant)
    assert line.known == 6
    order(line)
    assert line.known == 2
    for number in range(1000):
        line.charge(str(number), 1)
    assert line.known == 2
