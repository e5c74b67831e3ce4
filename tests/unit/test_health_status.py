"""The three rules of health, the page, who is told, and why."""

from typing import Any

import pytest

from stator.errors import UsageError
from stator.health import EndpointChange, EndpointState, SystemHealth
from stator.testing.manual_clock import ManualClock

pytestmark = pytest.mark.timeout(10)

PAYLOAD = {"token_ids": [1]}
READY, SICK, STARTING = EndpointState.READY, EndpointState.SICK, EndpointState.STARTING


def health(clock: ManualClock | None = None, **options: Any) -> SystemHealth:
    return SystemHealth(clock=clock or ManualClock(), **options)


def shown(system: SystemHealth) -> bytes:
    """The endpoints of the page."""
    return system.body().partition(b'"endpoints":')[2][:-1]


def test_the_page_to_the_byte() -> None:
    clock = ManualClock()
    system = health(clock)
    system.add("generate")
    clock.advance(5.603227205)
    assert system.body() == b'{"status":"notready","uptime":{"secs":5,"nanos":603227205},"endpoints":{"generate":"ready"}}'
    system.add("second")
    system.set_system(True)
    assert system.body().startswith(b'{"status":"ready","uptime":{"secs":5,')
    assert shown(system) == b'{"generate":"ready","second":"ready"}'


def test_nanoseconds_never_reach_a_second() -> None:
    clock = ManualClock(monotonic=0.0)
    system = health(clock)
    clock.advance(1.9999999999)
    assert b'"uptime":{"secs":2,"nanos":0}' in system.body()


def test_without_lists_and_targets_the_process_decides() -> None:
    system = health()
    system.add("generate")
    assert not system.ready
    system.set_system(True)
    assert system.ready
    system.set_system(False)
    assert not system.ready
    assert health(starting_status="ready").ready


def test_a_payload_without_canary_is_ready_at_once() -> None:
    system = health()
    target = system.add("generate", payload=PAYLOAD, instance_id=7)
    assert target is not None
    assert (target.endpoint, target.payload, target.instance_id) == ("generate", PAYLOAD, 7)
    system.add("second")
    assert system.ready
    assert shown(system) == b'{"generate":"ready","second":"ready"}'
    assert system.activity("generate") is None, "nobody asks"


def test_with_canary_a_target_begins_as_not_ready_and_others_are_not_listed() -> None:
    system = health(canary=True, starting_status="ready")
    system.add("plain")
    assert system.ready
    assert shown(system) == b"{}"
    system.add("generate", payload=PAYLOAD)
    assert not system.ready, "targets decide, whatever the process says"
    assert shown(system) == b'{"generate":"notready"}'
    system.set_endpoint("generate", READY, "answered a canary")
    assert system.ready
    with pytest.raises(UsageError, match="plain"):
        system.set_endpoint("plain", READY, "")


def test_all_targets_must_be_ready_and_only_they() -> None:
    system = health()
    system.add("one", payload=PAYLOAD)
    system.add("two", payload=PAYLOAD)
    system.add("plain")
    system.set_endpoint("plain", SICK, "no target")
    assert system.ready
    system.set_endpoint("two", SICK, "down")
    assert not system.ready


def test_listed_endpoints_come_first() -> None:
    system = health(listed=("generate", "missing"), starting_status="ready")
    system.add("generate")
    system.add("other", payload=PAYLOAD)
    assert not system.ready
    assert shown(system) == b'{"generate":"ready","missing":"notready","other":"ready"}'
    system.add("missing")
    assert system.ready
    system.set_endpoint("other", SICK, "is a target, but not listed")
    assert system.ready
    system.remove("missing")
    assert not system.ready
    assert b'"missing":"notready"' in shown(system)


def test_what_is_removed_does_not_count_any_more() -> None:
    system = health(canary=True, starting_status="ready")
    system.add("generate", payload=PAYLOAD)
    activity = system.activity("generate")
    assert activity is not None
    system.remove("generate")
    system.remove("generate")
    assert system.ready
    assert (system.targets, shown(system), system.state("generate")) == ({}, b"{}", None)
    activity.note()
    assert system.state("generate") is None
    system.add("generate", payload=PAYLOAD)
    activity.note()
    assert system.state("generate") is STARTING, "a note of the endpoint before says nothing about this one"


def test_the_first_target_of_a_name_stays(caplog: pytest.LogCaptureFixture) -> None:
    system = health(canary=True)
    first = system.add("generate", payload=PAYLOAD)
    system.set_endpoint("generate", SICK, "down")
    assert system.add("generate", payload={"other": 1}) is first
    assert "already" in caplog.text
    assert system.targets == {"generate": first}
    assert system.state("generate") is SICK


def test_real_answers_make_ready() -> None:
    clock = ManualClock()
    system = health(clock, canary=True)
    system.add("generate", payload=PAYLOAD)
    activity = system.activity("generate")
    assert activity is not None
    for _ in range(2):
        clock.advance(1)
        activity.note()
        assert activity.last == clock.monotonic()
        assert system.ready
        system.set_endpoint("generate", SICK, "down")
        assert not system.ready


def test_subscribers_hear_each_change_once(caplog: pytest.LogCaptureFixture) -> None:
    system = health(canary=True)
    heard: list[EndpointChange] = []

    def broken(change: EndpointChange) -> None:
        raise ValueError("mine")

    system.subscribe(broken)
    end = system.subscribe(heard.append)
    system.add("generate", payload=PAYLOAD)
    assert heard == []
    system.set_endpoint("generate", SICK, "hangs")
    system.set_endpoint("generate", SICK, "hangs still")
    system.set_endpoint("generate", READY, "answers")
    assert [(change.previous, change.state, change.reason) for change in heard] == [
        (STARTING, SICK, "hangs"),
        (SICK, READY, "answers"),
    ]
    assert "a subscriber to the health of endpoint generate failed" in caplog.text
    assert "endpoint generate is notready: hangs" in caplog.text
    end()
    end()
    system.set_endpoint("generate", SICK, "hangs")
    assert len(heard) == 2


def test_a_subscriber_sees_the_new_state() -> None:
    system = health(canary=True)
    system.add("generate", payload=PAYLOAD)
    seen: list[EndpointState | None] = []
    system.subscribe(lambda change: seen.append(system.state(change.endpoint)))
    system.set_endpoint("generate", READY, "answers")
    assert seen == [READY]


def test_it_says_why_and_since_when() -> None:
    clock = ManualClock()
    system = health(clock, canary=True)
    system.add("generate", payload=PAYLOAD)
    clock.advance(10)
    why = system.explain()
    assert (why.status, why.seconds, why.rule) == ("notready", 10, "canary targets")
    assert "neither a canary nor a request" in why.obstacles[0].reason
    system.set_endpoint("generate", READY, "answers")
    clock.advance(5)
    assert system.explain().obstacles == ()
    assert system.explain().seconds == 5
    system.set_endpoint("generate", SICK, "canary: hangs")
    clock.advance(2)
    system.set_endpoint("generate", SICK, "canary: hangs again")
    (obstacle,) = system.explain().obstacles
    assert (obstacle.endpoint, obstacle.reason, obstacle.seconds) == ("generate", "canary: hangs again", 2)


def test_it_says_why_when_nothing_can_make_it_ready() -> None:
    clock = ManualClock()
    system = health(clock)
    clock.advance(3)
    (obstacle,) = system.explain().obstacles
    assert (obstacle.endpoint, obstacle.seconds) == ("", 3)
    assert "starting status" in obstacle.reason
    listed = health(clock, listed=("generate",), canary=True)
    assert "not served" in listed.explain().obstacles[0].reason
    listed.add("generate")
    assert "no canary payload" in listed.explain().obstacles[0].reason


def test_a_reason_that_the_program_gives_is_on_the_page_while_it_is_not_ready() -> None:
    system = SystemHealth(clock=ManualClock())
    system.set_system(False, "loading weights")
    assert system.body().endswith(b'"endpoints":{},"reason":"loading weights"}')
    system.set_system(True, "loaded")
    assert b"reason" not in system.body()
    system.set_system(False)
    assert b"reason" not in system.body(), "the page is the reference's then"


def test_no_reason_is_given_for_what_others_decide() -> None:
    system = SystemHealth(clock=ManualClock())
    system.set_system(False, "loading weights")
    system.add("generate", payload={})
    assert system.ready
    assert b"reason" not in system.body()
