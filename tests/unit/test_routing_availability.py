"""Who may be chosen: marks, preferences, expiry, errors and explanations."""

import pytest

from stator.errors import ConfigError, ConnectFailed, Overloaded, Unavailable
from stator.protocol.ids import EndpointId
from stator.routing import Availability, Candidate, Occupancy, RouteRequest, RoutingConfig

ENDPOINT = EndpointId("demo", "backend", "generate")


def view(count: int = 3, config: RoutingConfig | None = None) -> Availability:
    availability = Availability(ENDPOINT, config or RoutingConfig(overloaded_for=5.0))
    availability.update(Occupancy().update(dict.fromkeys(range(1, count + 1), "cuda")))
    return availability


def ids(candidates: tuple[Candidate, ...]) -> list[int]:
    return [candidate.instance_id for candidate in candidates]


def test_all_discovered_instances_are_free_in_order() -> None:
    availability = view()
    assert ids(availability.free(0.0)) == [1, 2, 3]
    assert len(availability) == 3 and availability.knows(2) and not availability.knows(9)


def test_the_answer_is_kept_until_something_changes() -> None:
    availability = view()
    first = availability.free(0.0)
    assert availability.free(1e9) is first
    availability.mark_overloaded(1, 5.0)
    assert availability.free(5.0) is not first
    assert availability.free(9.9) is availability.free(6.0)


def test_inhibition_doubles_to_a_minute_and_starts_over_after_a_success() -> None:
    availability = view(2)
    now, lengths = 0.0, []
    for _ in range(6):
        availability.mark_inhibited(1, now)
        row = availability.explain(now)[0]
        assert row.state == "inhibited" and row.until is not None
        lengths.append(row.until - now)
        assert ids(availability.free(now)) == ids(availability.free(row.until - 0.001)) == [2]
        now = row.until
        assert ids(availability.free(now)) == [1, 2]
    assert lengths == [5, 10, 20, 40, 60, 60]
    availability.mark_success(1)
    availability.mark_inhibited(1, now)
    assert availability.explain(now)[0].until == now + 5


def test_failures_during_an_inhibition_count_as_the_same() -> None:
    availability = view(2)
    for _ in range(64):
        availability.mark_inhibited(1, 0.0, "connection refused")
    assert availability.explain(0.0)[0].until == 5.0


def test_a_success_ends_the_inhibition_at_once() -> None:
    availability = view(2)
    availability.mark_inhibited(1, 0.0)
    availability.mark_suspect(2)
    availability.mark_success(1)
    assert ids(availability.free(0.1)) == [1]
    availability.mark_success(2)
    assert ids(availability.free(0.1)) == [1, 2]


def test_if_all_are_inhibited_the_one_ending_first_is_used() -> None:
    availability = view(3)
    availability.mark_inhibited(2, 0.0)
    availability.mark_inhibited(1, 1.0)
    availability.mark_inhibited(3, 2.0)
    assert ids(availability.free(2.0)) == [2]
    assert ids(availability.free(2.0, RouteRequest(excluded={2}))) == [1]
    assert ids(availability.free(2.0, RouteRequest(excluded={1, 2}))) == [3]


def test_suspects_are_used_before_inhibited_ones() -> None:
    availability = view(3)
    availability.mark_inhibited(1, 0.0)
    availability.mark_suspect(2)
    assert ids(availability.free(0.0)) == [3]
    assert ids(availability.free(0.0, RouteRequest(excluded={3}))) == [2]
    assert ids(availability.free(0.0, RouteRequest(excluded={2, 3}))) == [1]
    availability.mark_suspect(3)
    assert ids(availability.free(0.0)) == [2, 3]
    availability.clear_suspect(2)
    assert ids(availability.free(0.0)) == [2]


def test_overload_expires() -> None:
    availability = view(2)
    availability.mark_overloaded(1, 0.0)
    assert ids(availability.free(0.5)) == [2]
    availability.mark_overloaded(2, 1.0, seconds=2.0)
    assert ids(availability.free(3.0)) == [2]
    assert ids(availability.free(5.0)) == [1, 2]


def test_a_request_that_ends_makes_room() -> None:
    availability = view(2)
    availability.mark_overloaded(1, 0.0)
    availability.mark_inhibited(1, 0.0)
    availability.mark_room(2)
    assert ids(availability.free(0.1)) == [2]
    availability.mark_room(1)
    assert [row.state for row in availability.explain(0.1)] == ["inhibited", "free"], "it has room, but it also failed"


def test_an_overloaded_instance_is_not_a_refuge_while_an_inhibited_one_is() -> None:
    availability = view(2)
    availability.mark_overloaded(1, 0.0)
    availability.mark_inhibited(2, 0.0)
    assert ids(availability.free(0.0)) == [2]


def test_when_all_refused_they_are_asked_again_one_by_one() -> None:
    """Somebody else's request may have ended meanwhile, which nobody tells us."""
    availability = view(3)
    for instance_id, now in ((2, 0.0), (3, 0.1), (1, 0.2)):
        availability.mark_overloaded(instance_id, now)
    assert ids(availability.free(0.3)) == [2]
    assert ids(availability.free(0.3, RouteRequest(excluded={2}))) == [3]
    availability.set_busy({3: "too many blocks"})
    assert ids(availability.free(0.3, RouteRequest(excluded={2}))) == [1], "a load report is a fact"
    with pytest.raises(Overloaded, match=r"3 of 3 workers of endpoint demo/backend/generate are busy"):
        availability.free(0.3, RouteRequest(excluded={1, 2}))


def test_the_busy_set_is_replaced_as_a_whole() -> None:
    availability = view(2)
    assert not availability.set_busy({1: "a", 7: "b"})
    assert ids(availability.free(0.0)) == [2]
    assert availability.set_busy({2: "c"}), "1 and 7 are free again"
    assert ids(availability.free(0.0)) == [1]
    assert not availability.set_busy({1: "a", 2: "c"})
    with pytest.raises(Overloaded):
        availability.free(0.0)
    assert availability.set_busy({})
    assert ids(availability.free(0.0)) == [1, 2]


def test_who_is_refused_hears_how_many_are_busy_and_what_the_nearest_lacks() -> None:
    availability = view(3)
    availability.set_busy({9: "not here", 3: "used 501 is over 500", 2: "used 900 is over 500"})
    availability.mark_draining(1)
    with pytest.raises(Overloaded) as caught:
        availability.free(0.0)
    assert caught.value.message == (
        "2 of 3 workers of endpoint demo/backend/generate are busy (1 more draining, failed, silent or already tried): "
        "2 over a limit, nearest instance 3: used 501 is over 500; retry after the next load report"
    )


def test_reasons_may_change_without_anybody_choosing_anew() -> None:
    availability = view(2)
    availability.set_busy({1: "501 of 500"})
    free = availability.free(0.0)
    availability.set_busy({1: "502 of 500"})
    assert availability.free(0.0) is free
    assert availability.explain(0.0)[0].reason == "502 of 500"


def with_limits(*limits: int | None) -> tuple[Availability, tuple[Candidate, ...]]:
    """Instances 1, 2, … that run so many requests at once."""
    availability = view(len(limits))
    candidates = availability.free(0.0)
    for candidate, limit in zip(candidates, limits, strict=True):
        candidate.limit = limit
    return availability, candidates


def test_instances_with_room_are_found_among_the_full() -> None:
    availability, (first, second, third) = with_limits(2, 1, 4)
    assert availability.room(0.0) == 7
    first.load, second.load, third.load = 2, 1, 3
    assert ids(availability.free(0.0)) == [1, 2, 3], "the answer that is kept does not depend on what runs"
    assert ids(availability.with_room(0.0)) == [3]
    assert availability.room(0.0) == 1 and availability.pressure(0.0) == ""
    with pytest.raises(Overloaded):
        availability.with_room(0.0, RouteRequest(excluded={3}))


def test_when_all_are_full_the_nearest_is_named() -> None:
    availability, (first, second, third) = with_limits(2, 8, 4)
    first.load, second.load, third.load = 5, 8, 4
    text = (
        "3 of 3 workers of endpoint demo/backend/generate are busy: "
        "3 with all requests they run at once, 8 of 8 on 2; retry when a request has ended"
    )
    with pytest.raises(Overloaded) as caught:
        availability.with_room(0.0)
    assert caught.value.message == text == availability.pressure(0.0)
    assert availability.room(0.0) == 0, "more than the limit is no negative room"
    row = availability.explain(0.0)[0]
    assert (row.state, row.reason, row.load, row.limit, row.chosen_from) == ("full", "5 requests of 2", 5, 2, False)


def test_each_kind_of_shortage_is_told() -> None:
    availability, (_, second, _) = with_limits(None, 1, None)
    second.load = 1
    availability.set_busy({1: "used 9 is over 5"})
    availability.mark_overloaded(3, 0.0)
    assert ids(availability.with_room(0.0)) == [3], "one that refused is asked before somebody is refused for it"
    with pytest.raises(Overloaded) as caught:
        availability.with_room(0.0, RouteRequest(excluded={3}))
    for part in (
        "3 of 3",
        "1 over a limit, nearest instance 1: used 9",
        "1 with all requests they run",
        "1 refused at capacity",
    ):
        assert part in caught.value.message


def test_the_silent_and_the_failed_are_no_refuge_while_others_are_well_but_full() -> None:
    availability, (first, *_) = with_limits(1, 1, 1)
    first.load = 1
    availability.mark_suspect(2)
    availability.mark_inhibited(3, 0.0)
    assert availability.room(0.0) == 0
    with pytest.raises(Overloaded, match=r"1 of 3 workers .* \(2 more draining, failed, silent or already tried\)"):
        availability.with_room(0.0)
    availability.mark_draining(1)
    assert ids(availability.with_room(0.0)) == [2], "nobody is well"
    assert availability.room(0.0) == 1


def test_an_instance_without_limit_has_room_for_everybody() -> None:
    availability, (first, second) = with_limits(1, None)
    first.load = second.load = 10**6
    assert availability.room(0.0) is None and availability.pressure(0.0) == ""
    assert ids(availability.with_room(0.0)) == [2]


def test_where_nobody_is_there_is_no_room() -> None:
    availability = view(0)
    assert availability.room(0.0) == 0
    assert availability.pressure(0.0) == "no workers available for endpoint demo/backend/generate"


def test_parts_share_marks_but_not_who_is_busy_or_barred() -> None:
    availability = view(3)
    part = availability.part()
    part.set_busy({1: "too much"})
    part.restrict_to({1, 2}, "it serves another card")
    assert ids(part.free(0.0)) == [2] and ids(availability.free(0.0)) == [1, 2, 3]
    availability.mark_inhibited(2, 0.0)
    assert ids(part.free(0.0)) == [2] and ids(availability.free(0.0)) == [1, 3]
    part.mark_draining(2)
    assert ids(availability.free(9.0)) == [1, 3]
    with pytest.raises(Overloaded, match=r"1 of 2 workers .* are busy \(1 more"):
        part.free(0.0)
    assert [(row.state, row.reason) for row in part.explain(0.0)] == [
        ("busy", "too much"),
        ("draining", "takes nothing new"),
        ("barred", "it serves another card"),
    ]
    availability.update(Occupancy().update({3: "", 4: ""}))
    with pytest.raises(Unavailable, match=r"2 may not be used \(it serves another card\)"):
        part.free(0.0)
    with pytest.raises(Unavailable, match=r"instance_id=3 .* cannot be used: it serves another card"):
        part.free(0.0, RouteRequest(target=3))
    part.restrict_to(None)
    assert ids(part.free(0.0)) == [3, 4]


def test_a_part_that_is_dropped_is_not_told_any_more() -> None:
    availability = view(1)
    for _ in range(100):
        availability.part()
    availability.mark_draining(1)
    assert len(availability._board._listeners) <= 2  # pyright: ignore[reportPrivateUsage]


def test_draining_instances_take_nothing_new_until_they_register_anew() -> None:
    availability = view(2)
    availability.mark_draining(1)
    assert ids(availability.free(0.0)) == [2]
    availability.mark_draining(2)
    with pytest.raises(
        Unavailable, match="no workers available for endpoint demo/backend/generate: of 2 known, 2 are draining"
    ):
        availability.free(0.0)
    availability.forget(1)
    assert ids(availability.free(0.0)) == [1]


def test_nobody_there() -> None:
    with pytest.raises(Unavailable, match=r"^no workers available for endpoint demo/backend/generate$"):
        view(0).free(0.0)


def test_all_tried() -> None:
    availability = view(2)
    with pytest.raises(Unavailable, match="of 2 known, 0 are draining and 2 were tried"):
        availability.free(0.0, RouteRequest(excluded={1, 2}))
    availability.mark_overloaded(2, 0.0)
    with pytest.raises(Overloaded, match=r"1 of 2 workers .* \(1 more draining.*\): 1 refused at capacity; retry in 5\.0 s"):
        availability.free(0.0, RouteRequest(excluded={1, 2}))


def test_a_target_is_the_only_candidate_even_if_others_are_preferred() -> None:
    availability = view(3)
    availability.mark_inhibited(2, 0.0)
    availability.mark_suspect(3)
    assert ids(availability.free(0.0, RouteRequest(target=2))) == [2]
    assert ids(availability.free(0.0, RouteRequest(target=3))) == [3]
    availability.mark_overloaded(2, 0.0)
    assert ids(availability.free(0.0, RouteRequest(target=2))) == [2], "nobody else can say whether it is still full"


def test_a_target_that_cannot_be_had_is_named() -> None:
    availability = view(3)
    with pytest.raises(ConnectFailed, match="instance_id=42 not found for endpoint demo/backend/generate") as caught:
        availability.free(0.0, RouteRequest(target=42))
    assert caught.value.instance == 42
    availability.mark_draining(1)
    with pytest.raises(Unavailable, match=r"instance_id=1 .* cannot be used: takes nothing new"):
        availability.free(0.0, RouteRequest(target=1))
    availability.set_busy({2: "used 9 is over 5"})
    with pytest.raises(Overloaded, match=r"instance_id=2 .* is busy \(used 9 is over 5\); retry after the next load report"):
        availability.free(1.0, RouteRequest(target=2))
    with pytest.raises(Unavailable, match=r"instance_id=3 .* was already tried"):
        availability.free(1.0, RouteRequest(target=3, excluded={3}))


def test_marks_go_with_the_instance_and_ignore_strangers() -> None:
    occupancy = Occupancy()
    availability = Availability(ENDPOINT)
    availability.update(occupancy.update({1: "", 2: ""}))
    availability.mark_draining(1)
    availability.mark_inhibited(9, 0.0)
    availability.update(occupancy.update({2: ""}))
    assert ids(availability.free(0.0)) == [2]
    availability.update(occupancy.update({2: "", 1: "", 9: ""}))
    assert ids(availability.free(0.0)) == [2, 1, 9]


def test_explain_names_state_reason_and_end() -> None:
    availability = view(6)
    availability.mark_inhibited(2, 0.0, "connection refused")
    availability.mark_suspect(3)
    availability.mark_overloaded(4, 0.0)
    availability.set_busy({5: "used 9 is over 5"})
    availability.mark_draining(6)
    rows = [(row.instance_id, row.state, row.reason, row.until, row.chosen_from) for row in availability.explain(1.0)]
    assert rows == [
        (1, "free", "", None, True),
        (2, "inhibited", "connection refused", 5.0, False),
        (3, "suspect", "silent with requests open", None, False),
        (4, "overloaded", "refused at capacity", 5.0, False),
        (5, "busy", "used 9 is over 5", None, False),
        (6, "draining", "takes nothing new", None, False),
    ]


def test_times_are_settings() -> None:
    availability = view(2, RoutingConfig(inhibit_first=1, inhibit_most=1.5, overloaded_for=2))
    availability.mark_inhibited(1, 0.0)
    availability.mark_inhibited(1, 1.0)
    availability.mark_overloaded(2, 0.0)
    assert [row.until for row in availability.explain(1.0)] == [2.5, 2.0]
    with pytest.raises(ConfigError, match="inhibit_first = 9 is above inhibit_most = 8"):
        RoutingConfig(inhibit_first=9, inhibit_most=8)
