"""Slots and the queue in front of them."""

from collections.abc import Callable

import pytest

from stator import settings
from stator.errors import Overloaded
from stator.runtime.admission import Admission, AdmissionConfig


class Guest:
    """Who waits for a slot."""

    def __init__(self, begun: Callable[[], object]) -> None:
        self.begin = begun


def test_slots_then_queue_then_refusal() -> None:
    admission = Admission(AdmissionConfig(slots=1, queue=2))
    started: list[int] = []
    assert admission.take()
    assert not admission.take()
    admission.wait(Guest(lambda: started.append(1)))
    assert not admission.full
    admission.wait(Guest(lambda: started.append(2)))
    assert admission.full
    with pytest.raises(Overloaded, match=r"1 requests run \(admission.slots = 1\) and 2 wait \(admission.queue = 2\)"):
        admission.wait(Guest(lambda: started.append(3)))
    assert (admission.running, admission.queued) == (1, 2)
    admission.release()
    assert (started, admission.running, admission.queued) == ([1], 1, 1)
    admission.release()
    admission.release()
    assert (started, admission.running, admission.queued) == ([1, 2], 0, 0)
    assert admission.take()


def test_who_leaves_the_queue_is_not_begun() -> None:
    admission = Admission(AdmissionConfig(slots=1, queue=2))
    started: list[str] = []
    first, second = Guest(lambda: started.append("first")), Guest(lambda: started.append("second"))
    assert admission.take()
    admission.wait(first)
    admission.wait(second)
    assert admission.leave(first)
    assert not admission.leave(first)
    admission.release()
    assert started == ["second"]


def test_no_queue_at_all() -> None:
    admission = Admission(AdmissionConfig(slots=1, queue=0))
    assert admission.take()
    with pytest.raises(Overloaded):
        admission.wait(Guest(lambda: None))


def test_a_long_queue_of_requests_that_end_at_once() -> None:
    admission = Admission(AdmissionConfig(slots=1, queue=100_000))
    assert admission.take()
    for _ in range(50_000):
        admission.wait(Guest(admission.release))
    admission.release()
    assert (admission.running, admission.queued) == (0, 0)


def test_the_reference_s_variables() -> None:
    pool = settings.load(AdmissionConfig, env={"DYN_TCP_WORKER_POOL_SIZE": "7", "DYN_TCP_WORK_QUEUE_SIZE": "8"})
    assert pool.limits == (7, 8)
    env = {"DYN_ENGINE_REQUEST_LIMIT": "3", "DYN_DYNAMO_REQUEST_QUEUE_LIMIT": "5"}
    assert settings.load(AdmissionConfig, env=env).limits == (3, 5)


def test_an_engine_may_say_how_many_it_answers_at_once() -> None:
    admission = Admission(AdmissionConfig(queue=1))
    admission.suggest(2)
    assert (admission.slots, admission.room) == (2, 1)
    assert admission.take()
    assert admission.take()
    assert not admission.take()
    admission.wait(Guest(lambda: None))
    with pytest.raises(
        Overloaded, match=r"2 requests run \(the engine's max_num_seqs = 2\) and 1 wait \(admission.queue = 1\)"
    ):
        admission.wait(Guest(lambda: None))


def test_engines_of_one_process_share_what_they_say() -> None:
    admission = Admission(AdmissionConfig())
    admission.suggest(2)
    admission.suggest(3)
    assert (admission.slots, admission.room) == (5, 16)


@pytest.mark.parametrize(
    ("settings", "limits"),
    [({"slots": 7}, (7, 16)), ({"pool_slots": 50}, (50, 40_000)), ({"pool_queue": 5}, (10_000, 5))],
)
def test_what_the_operator_has_set_stands(settings: dict[str, int], limits: tuple[int, int]) -> None:
    admission = Admission(AdmissionConfig(**settings))
    admission.suggest(2)
    assert (admission.slots, admission.room) == limits
