"""The instances of an endpoint: how many requests each is given, and who hears of room."""

from typing import Any

from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord, Transport
from stator.routing import RoutingConfig
from stator.runtime.view import InstanceView

ENDPOINT = EndpointId("demo", "backend", "generate")


def records(*instances: int) -> dict[int, EndpointRecord]:
    return {
        instance: EndpointRecord(
            component="backend", endpoint="generate", namespace="demo", instance_id=instance, transport=Transport(tcp="h:1/a/b")
        )
        for instance in instances
    }


def view(*instances: int, **routing: Any) -> InstanceView:
    made = InstanceView(ENDPOINT, RoutingConfig(**routing), lambda: 0.0, lambda record: None)
    made.update(records(*instances))
    return made


def limits(view: InstanceView) -> dict[int, int | None]:
    return {row.instance_id: row.limit for row in view.availability.explain(0.0)}


def test_limits_are_kept_through_changes_of_discovery() -> None:
    it = view(1, 2)
    assert limits(it) == {1: None, 2: None}
    it.set_slots({1: 4, 3: 8})
    assert limits(it) == {1: 4, 2: None}
    it.update(records(1, 3))
    assert limits(it) == {1: 4, 3: 8}, "the card may be known before the instance"
    it.update(records(3))
    it.update(records(1, 3))
    assert limits(it) == {1: 4, 3: 8}
    it.set_slots({})
    assert limits(it) == {1: None, 3: None}


def test_limits_are_scaled() -> None:
    def limit(slots: int, factor: float) -> int | None:
        it = view(1, slots_factor=factor)
        it.set_slots({1: slots})
        return limits(it)[1]

    assert limit(4, 1.0) == 4
    assert limit(3, 1.5) == 4
    assert limit(1, 0.1) == 1, "one is always allowed"
    assert limit(4, 0.0) is None
    assert limit(0, 1.0) is None, "some cards say 0 for unknown"


def test_those_who_watch_hear_of_room_and_of_nothing_else() -> None:
    it = view(1, 2)
    heard: list[str] = []
    ends = [it.watch_room(lambda name=name: heard.append(name)) for name in ("a", "b")]

    def told() -> list[str]:
        found = sorted(heard)
        heard.clear()
        return found

    first, second = it.availability.free(0.0)
    it.set_slots({1: 2})
    assert told() == ["a", "b"]
    it.set_slots({1: 2})
    it.occupancy.acquire(first)
    it.occupancy.acquire(second)
    assert told() == []
    it.occupancy.release(second)
    assert told() == [], "it takes any number anyway"
    it.occupancy.release(first)
    assert told() == ["a", "b"]
    it.occupancy.release(first)
    assert told() == [], "it carried nothing"
    it.update(records(1, 2, 3))
    assert told() == ["a", "b"], "an instance came"
    ends[0]()
    ends[0]()
    it.more_room()
    assert told() == ["b"]
    ends[1]()
    it.more_room()
    assert told() == [] and it.occupancy.on_room is None


def test_a_watcher_that_fails_does_not_keep_others_from_hearing() -> None:
    it = view(1)
    heard: list[int] = []

    def broken() -> None:
        raise ValueError("mine")

    it.watch_room(broken)
    it.watch_room(lambda: heard.append(1))
    it.more_room()
    assert heard == [1]
