"""Request ids, and the news from planes that every view of the process hears."""

import uuid
from random import Random

import pytest

from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord, Transport
from stator.routing import RoutingConfig
from stator.runtime.services import RequestIds, ViewsObserver
from stator.runtime.view import InstanceView
from stator.testing.manual_clock import ManualClock

pytestmark = pytest.mark.timeout(10)


def test_request_ids_look_like_random_uuids_and_never_repeat() -> None:
    new_id = RequestIds(Random(7))
    ids = [new_id() for _ in range(10_000)]
    assert len(set(ids)) == len(ids)
    for text in (ids[0], ids[255], ids[-1]):
        assert str(uuid.UUID(text)) == text
        assert uuid.UUID(text).version == 4
        assert uuid.UUID(text).variant == uuid.RFC_4122


def test_two_processes_have_ids_of_their_own() -> None:
    one, other = RequestIds(Random(1)), RequestIds(Random(2))
    assert {one() for _ in range(1000)}.isdisjoint(other() for _ in range(1000))


def record(endpoint: str, instance: int) -> EndpointRecord:
    return EndpointRecord(
        component="backend", endpoint=endpoint, namespace="test", instance_id=instance, transport=Transport(tcp="127.0.0.1:1/x")
    )


def view_of(endpoint: str, clock: ManualClock, *instances: int) -> InstanceView:
    view = InstanceView(EndpointId("test", "backend", endpoint), RoutingConfig(), clock.monotonic, lambda record: None)
    view.update({instance: record(endpoint, instance) for instance in instances})
    return view


def states(view: InstanceView) -> dict[int, str]:
    return {row.instance_id: row.state for row in view.availability.explain(view.now())}


def test_news_about_an_instance_reach_all_its_endpoints() -> None:
    clock = ManualClock()
    views = [view_of("a", clock, 1, 2), view_of("b", clock, 1), view_of("c", clock, 3)]
    observer = ViewsObserver({view.endpoint: view for view in views})
    observer.suspect(1)
    assert [states(view) for view in views] == [{1: "suspect", 2: "free"}, {1: "suspect"}, {3: "free"}]
    observer.recovered(1)
    assert [states(view) for view in views] == [{1: "free", 2: "free"}, {1: "free"}, {3: "free"}]
    observer.suspect(1)
    observer.lost(1, "silent")
    assert [states(view) for view in views] == [{1: "inhibited", 2: "free"}, {1: "inhibited"}, {3: "free"}]
    clock.advance(5.01)
    assert states(views[0]) == {1: "free", 2: "free"}  # the suspicion went with the connection
    observer.draining(1)
    assert states(views[0]) == {1: "draining", 2: "free"}
    observer.suspect(99)
    observer.lost(99, "never seen")
    assert [len(states(view)) for view in views] == [2, 1, 1]


def test_marks_stay_with_an_instance_and_go_with_it() -> None:
    clock = ManualClock()
    view = view_of("a", clock, 1, 2)
    view.availability.mark_draining(1)
    view.update({1: record("a", 1), 2: record("a", 2), 3: record("a", 3)})
    assert states(view)[1] == "draining"
    view.update({2: record("a", 2)})
    view.update({1: record("a", 1), 2: record("a", 2)})
    assert states(view) == {1: "free", 2: "free"}


def test_an_instance_that_registered_anew_starts_anew() -> None:
    clock = ManualClock()
    gone: list[EndpointRecord] = []
    view = InstanceView(EndpointId("test", "backend", "a"), RoutingConfig(), clock.monotonic, gone.append)
    old = record("a", 1)
    view.update({1: old})
    view.availability.mark_draining(1)
    restarted = EndpointRecord(
        component="backend", endpoint="a", namespace="test", instance_id=1, transport=Transport(tcp="127.0.0.1:2/x")
    )
    view.update({1: restarted})
    assert states(view) == {1: "free"}
    assert gone == [old]  # what waits for the old process waits in vain
