"""When an endpoint is probed and what an outcome means, without tasks."""

import pytest

from stator.health.canary_schedule import CanarySchedule, Step, Verdict

pytestmark = pytest.mark.timeout(10)

NEVER = float("-inf")


def schedule(*, wait: float = 10, timeout: float = 3, busy_limit: float | None = 60) -> CanarySchedule:
    return CanarySchedule(wait=wait, timeout=timeout, busy_limit=busy_limit, now=0)


def test_silence_brings_a_probe_and_answers_put_it_off() -> None:
    plan = schedule()
    assert plan.step(9.9, NEVER) == (Step.WAIT, 10)
    assert plan.step(10, 4) == (Step.WAIT, 14)
    assert plan.step(14, 4) == (Step.PROBE, 17)
    assert plan.probing


def test_the_cadence_of_an_idle_endpoint_does_not_drift() -> None:
    plan = schedule()
    begun: list[float] = []
    now = 0.0
    while len(begun) < 1000:
        step, again = plan.step(now, NEVER)
        if step is Step.PROBE:
            begun.append(again - 3)
            assert plan.judge(now + 1, NEVER, failed=False, full=False) is Verdict.HEALTHY
            again = plan.ended(now + 1, NEVER)
        now = again + 0.3  # the timer is late
    assert begun == pytest.approx([10.3 + 10 * n for n in range(1000)])


def test_after_a_long_pause_there_is_one_probe_not_many() -> None:
    plan = schedule()
    assert plan.step(1000, NEVER)[0] is Step.PROBE
    assert plan.ended(1001, NEVER) == 1010


def test_one_probe_at_a_time_and_a_stuck_one_is_judged_again() -> None:
    plan = schedule(wait=10, timeout=3)
    plan.step(10, NEVER)
    assert plan.step(11, NEVER) == (Step.WAIT, 13)
    for now in (13, 23, 33):
        assert not plan.given_up or now > 13
        assert plan.step(now, NEVER) == (Step.GIVE_UP, now + 10)
        assert plan.given_up
        assert plan.judge(now, NEVER, failed=True, full=False) is Verdict.SICK
    assert plan.ended(40, NEVER) == 40
    assert not plan.given_up
    assert plan.step(40, NEVER)[0] is Step.PROBE


def test_a_timeout_longer_than_the_wait_does_not_overlap() -> None:
    plan = schedule(wait=1, timeout=5)
    assert plan.step(1, NEVER) == (Step.PROBE, 6)
    assert plan.step(2, NEVER) == (Step.WAIT, 6)
    assert plan.step(6, NEVER)[0] is Step.GIVE_UP


def test_a_failure_outrun_by_a_real_answer_does_not_count() -> None:
    plan = schedule()
    plan.step(10, NEVER)
    assert plan.judge(12, 11, failed=True, full=False) is Verdict.OUTRUN
    assert plan.judge(12, 9.9, failed=True, full=False) is Verdict.SICK


def test_full_is_busy_until_nobody_was_answered_for_too_long() -> None:
    plan = schedule(busy_limit=60)
    plan.step(10, NEVER)
    plan.judge(10, NEVER, failed=False, full=False)
    plan.ended(10, NEVER)
    plan.step(20, NEVER)
    assert plan.judge(69.9, NEVER, failed=True, full=True) is Verdict.BUSY
    assert plan.judge(70, NEVER, failed=True, full=True) is Verdict.SICK
    assert plan.judge(70, 15, failed=True, full=True) is Verdict.BUSY
    assert plan.judge(30, NEVER, failed=True, full=False) is Verdict.SICK
    endless = schedule(busy_limit=None)
    endless.step(10, NEVER)
    assert endless.judge(1e9, NEVER, failed=True, full=True) is Verdict.BUSY
