"""Who is busy, for a load that has nothing to do with KV blocks: temperatures in an oven, whose doors stick a little."""

import pytest

from stator.routing import Group, LoadTable


class Oven:
    """Load: a temperature. Capacity: what the oven stands. Threshold: which part of it is too hot. Hot ones have to cool down well."""

    def merge(self, known: int, news: int) -> int:
        return news if news >= 0 else known

    def is_over(self, load: int, capacity: int, threshold: float, was_over: bool) -> bool:
        return load > capacity * threshold - (10 if was_over else 0)

    def excess(self, load: int, capacity: int, threshold: float) -> float:
        return load - capacity * threshold

    def reason(self, load: int, capacity: int, threshold: float) -> str:
        return f"{load}° is over {capacity * threshold:g}°"


Table = LoadTable[str, int, int, float]


def table(
    workers: dict[int, int] | None = None,
    *,
    threshold: float = 0.5,
    repeating: frozenset[int] = frozenset(),
    max_ranks: int = 1024,
    max_strangers: int = 1024,
) -> Table:
    made = Table(Oven(), stale_after=5.0, max_ranks=max_ranks, max_strangers=max_strangers)
    made.follow({"bread": Group(workers=workers or {1: 100, 2: 200}, threshold=threshold)}, repeating, 0.0)
    return made


def busy(table: Table, key: str = "bread") -> dict[int, str]:
    return dict(table.busy(key))


def test_a_worker_is_busy_while_its_report_is_over() -> None:
    ovens = table()
    assert busy(ovens) == {}, "who has not reported is free"
    assert not ovens.hear(1, 0, 50, 0.0)
    assert ovens.hear(1, 0, 51, 0.1) == ["bread"]
    assert busy(ovens) == {1: "51° is over 50°"}
    assert not ovens.hear(1, 0, 60, 0.2), "nobody else is busy than before"
    assert busy(ovens) == {1: "60° is over 50°"}, "but the value is the last one"
    assert not ovens.hear(1, 0, 45, 0.3), "the rule lets go later than it seizes"
    assert ovens.hear(1, 0, 40, 0.4) == ["bread"]
    assert busy(ovens) == {}
    assert not ovens.hear(1, 0, 45, 0.5)


def test_what_a_report_leaves_unsaid_stands() -> None:
    ovens = table()
    ovens.hear(1, 0, 70, 0.0)
    assert not ovens.hear(1, 0, -1, 0.1)
    assert busy(ovens) == {1: "70° is over 50°"}


def test_all_ranks_that_reported_must_be_over() -> None:
    ovens = table()
    assert ovens.hear(1, 0, 90, 0.0) == ["bread"]
    assert ovens.hear(1, 1, 10, 0.1) == ["bread"], "another rank has room"
    assert busy(ovens) == {}
    assert ovens.hear(1, 1, 60, 0.2) == ["bread"]
    assert busy(ovens) == {1: "rank 1: 60° is over 50°"}, "the rank nearest to room is named"
    assert not ovens.hear(1, 2, 99, 0.3)
    assert ovens.hear(1, 0, 0, 0.4) == ["bread"]


def test_the_nearest_worker_comes_first() -> None:
    ovens = table({1: 100, 2: 100, 3: 100})
    for worker, degrees in ((1, 90), (2, 55), (3, 70)):
        ovens.hear(worker, 0, degrees, 0.0)
    assert list(ovens.busy("bread")) == [2, 3, 1]
    ovens.hear(1, 0, 51, 0.0)
    assert list(ovens.busy("bread")) == [1, 2, 3]
    assert 1 in ovens.busy("bread") and len(ovens.busy("bread")) == 3
    with pytest.raises(KeyError):
        _ = ovens.busy("bread")[9]


def test_an_answer_keeps_its_workers() -> None:
    ovens = table()
    ovens.hear(1, 0, 90, 0.0)
    before = ovens.busy("bread")
    ovens.hear(1, 0, 0, 0.1)
    assert list(before) == [1] and not ovens.busy("bread")
    ovens.follow({}, frozenset(), 0.2)
    assert before[1] == "its last report was forgotten"


def test_a_worker_in_several_groups_is_judged_in_each() -> None:
    ovens = Table(Oven())
    groups = {"bread": Group(workers={1: 100}, threshold=0.5), "pizza": Group(workers={1: 100, 2: 100}, threshold=0.9)}
    ovens.follow(groups, frozenset(), 0.0)
    assert ovens.hear(1, 0, 60, 0.0) == ["bread"]
    assert ovens.hear(1, 0, 95, 0.1) == ["pizza"]
    assert busy(ovens).keys() == busy(ovens, "pizza").keys() == {1}
    assert [row.over for row in ovens.rows()] == [("bread", "pizza")]
    assert set(ovens.hear(1, 0, 0, 0.2)) == {"bread", "pizza"}


def test_a_threshold_acts_at_once() -> None:
    ovens = table()
    ovens.hear(1, 0, 60, 0.0)
    ovens.hear(2, 0, 90, 0.0)
    assert ovens.set_threshold("bread", 0.7) == ("bread",)
    assert busy(ovens) == {} and ovens.threshold("bread") == 0.7
    assert ovens.set_threshold("bread", 0.4) == ("bread",)
    assert busy(ovens) == {1: "60° is over 40°", 2: "90° is over 80°"}
    assert ovens.set_threshold("bread", 0.39) == ()
    assert ovens.threshold("cake") is None


def test_who_leaves_takes_its_state_along() -> None:
    ovens = table()
    ovens.hear(1, 0, 90, 0.0)
    assert ovens.follow({"bread": Group(workers={2: 200}, threshold=0.5)}, frozenset(), 0.1) == ["bread"]
    assert busy(ovens) == {} and len(ovens) == 0
    assert ovens.follow({"bread": Group(workers={1: 100, 2: 200}, threshold=0.5)}, frozenset(), 0.2) == []
    assert busy(ovens) == {}, "who comes back starts anew"
    ovens.hear(1, 0, 90, 0.3)
    assert ovens.follow({}, frozenset(), 0.4) == ["bread"], "a group that goes is news if somebody was busy"
    assert busy(ovens) == {}


def test_who_stays_keeps_its_state_through_changes_of_others() -> None:
    ovens = table()
    ovens.hear(1, 0, 55, 0.0)
    ovens.hear(1, 0, 45, 0.1)
    assert ovens.follow({"bread": Group(workers={1: 100, 3: 50}, threshold=0.5)}, frozenset(), 0.2) == []
    assert busy(ovens).keys() == {1}, "that it was over is not forgotten"
    assert ovens.follow({"bread": Group(workers={1: 200, 3: 50}, threshold=0.5)}, frozenset(), 0.3) == ["bread"], (
        "a new capacity"
    )


def test_reports_from_before_the_record_count_when_it_comes() -> None:
    ovens = table()
    assert not ovens.hear(3, 0, 90, 0.0)
    assert not ovens.hear(3, 1, 80, 0.1)
    assert ovens.strangers == 1
    assert ovens.follow({"bread": Group(workers={3: 100}, threshold=0.5)}, frozenset(), 0.2) == ["bread"]
    assert busy(ovens) == {3: "rank 1: 80° is over 50°"} and ovens.strangers == 0


def test_strangers_are_bounded_and_those_heard_of_last_are_kept() -> None:
    ovens = table(max_strangers=3)
    for worker in (11, 12, 13, 11, 14):
        ovens.hear(worker, 0, 90, 0.0)
    assert ovens.strangers == 3
    ovens.follow({"bread": Group(workers=dict.fromkeys((11, 12, 13, 14), 100), threshold=0.5)}, frozenset(), 1.0)
    assert busy(ovens).keys() == {11, 13, 14}
    assert not table(max_strangers=0).hear(11, 0, 90, 0.0)


def test_ranks_are_bounded() -> None:
    ovens = table(max_ranks=2)
    for rank in range(5):
        ovens.hear(1, rank, 90, 0.0)
    assert ovens.dropped == 3
    assert ovens.hear(1, 1, 0, 0.1) == ["bread"], "known ranks are heard still"
    assert sorted(row.rank for row in ovens.rows()) == [0, 1]


def test_only_those_that_repeat_themselves_go_stale() -> None:
    ovens = table(repeating=frozenset({1}))
    ovens.hear(1, 0, 90, 0.0)
    ovens.hear(1, 1, 90, 2.0)
    ovens.hear(2, 0, 190, 0.0)
    assert ovens.forget_stale(5.0) == []
    assert [(row.worker, row.rank, row.heard) for row in ovens.rows()] == [(1, 0, 0.0), (1, 1, 2.0), (2, 0, 0.0)]
    assert ovens.forget_stale(5.1) == [], "the other rank is over still"
    assert busy(ovens).keys() == {1, 2}
    assert ovens.forget_stale(7.1) == ["bread"]
    assert busy(ovens).keys() == {2} and len(ovens) == 1
    assert ovens.forget_stale(1e9) == []


def test_a_rank_that_goes_stale_may_leave_the_worker_busy() -> None:
    ovens = table(repeating=frozenset({1}))
    ovens.hear(1, 0, 10, 0.0)
    ovens.hear(1, 1, 90, 1.0)
    assert busy(ovens) == {}
    assert ovens.forget_stale(5.5) == ["bread"]
    assert busy(ovens).keys() == {1}, "nothing is known of the rank that had room"


def test_old_reports_of_a_stranger_do_not_count_once_it_turns_out_to_repeat_itself() -> None:
    ovens = table()
    ovens.hear(3, 0, 90, 0.0)
    ovens.follow({"bread": Group(workers={3: 100}, threshold=0.5)}, frozenset({3}), 6.0)
    assert busy(ovens) == {}
