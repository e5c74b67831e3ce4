"""Busy workers after any sequence of news are those a naive look at all that was said would find."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stator.llm.kv_load import KvCapacity, KvLoadRule
from stator.llm.load_event import ActiveLoad
from stator.llm.thresholds import Thresholds
from stator.routing import Group, LoadTable

WORKERS = st.integers(1, 5)
RANKS = st.integers(0, 3)
VALUES = st.none() | st.integers(0, 120)
THRESHOLDS = st.builds(
    Thresholds,
    active_decode_blocks_threshold=st.none() | st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    active_prefill_tokens_threshold=st.none() | st.integers(0, 100),
    active_prefill_tokens_threshold_frac=st.none() | st.sampled_from([-1.0, 0.0, 0.5, 2.0]),
)
CAPACITIES = st.builds(
    KvCapacity,
    total_kv_blocks=st.none() | st.sampled_from([50, 100]),
    max_num_batched_tokens=st.none() | st.sampled_from([20, 60]),
)
GROUPS = st.dictionaries(
    st.sampled_from("abc"),
    st.builds(Group[KvCapacity, Thresholds], workers=st.dictionaries(WORKERS, CAPACITIES), threshold=THRESHOLDS),
)

Said = tuple[float, int | None, int | None, int | None]
"""when it was heard, and the last values of the three signals"""


class Loads(RuleBasedStateMachine):
    """Reports, cards and thresholds in any order; the model keeps the reference's latch as the reference describes it."""

    @initialize()
    def begin(self) -> None:
        self.now = 0.0
        self.table: LoadTable[str, ActiveLoad, KvCapacity, Thresholds] = LoadTable(KvLoadRule(), stale_after=5.0)
        self.groups: dict[str, Group[KvCapacity, Thresholds]] = {}
        self.repeating: set[int] = set()
        self.said: dict[int, dict[int, Said]] = {}
        self.told: dict[str, set[int]] = {}

    def heed(self, changed: object) -> None:
        """Look again at the groups that are said to have changed, and at no others."""
        assert isinstance(changed, list | tuple)
        for key in set(changed):
            self.told[key] = set(self.table.busy(key))

    def drop_stale(self) -> None:
        for worker in self.repeating:
            ranks = self.said.get(worker, {})
            for rank in [rank for rank, (heard, *_) in ranks.items() if heard < self.now - 5.0]:
                del ranks[rank]

    @rule(groups=GROUPS, repeating=st.sets(WORKERS))
    def the_directory_changes(self, groups: dict[str, Group[KvCapacity, Thresholds]], repeating: set[int]) -> None:
        before = {worker for group in self.groups.values() for worker in group.workers}
        after = {worker for group in groups.values() for worker in group.workers}
        self.groups, self.repeating = groups, repeating & after
        for gone in before - after:
            self.said.pop(gone, None)
        self.drop_stale()
        self.heed(self.table.follow(groups, self.repeating, self.now))

    @rule(data=st.data(), threshold=THRESHOLDS)
    def somebody_sets_a_threshold(self, data: st.DataObject, threshold: Thresholds) -> None:
        if self.groups:
            key = data.draw(st.sampled_from(sorted(self.groups)))
            self.groups[key] = Group(workers=self.groups[key].workers, threshold=threshold)
            self.heed(self.table.set_threshold(key, threshold))

    @rule(worker=WORKERS, rank=RANKS, decode=VALUES, prefill=VALUES, used=VALUES)
    def a_rank_reports(self, worker: int, rank: int, decode: int | None, prefill: int | None, used: int | None) -> None:
        ranks = self.said.setdefault(worker, {})
        _, *known = ranks.get(rank, (0.0, None, None, None))
        news = [old if new is None else new for old, new in zip(known, (decode, prefill, used), strict=True)]
        ranks[rank] = (self.now, news[0], news[1], news[2])
        load = ActiveLoad(
            worker_id=worker, dp_rank=rank, active_decode_blocks=decode, active_prefill_tokens=prefill, kv_used_blocks=used
        )
        self.heed(self.table.hear(worker, rank, load, self.now))

    @rule(seconds=st.floats(0, 4))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.drop_stale()
        self.heed(self.table.forget_stale(self.now))

    @invariant()
    def nobody_else_is_busy(self) -> None:
        if not hasattr(self, "groups"):
            return
        for key in "abc":
            group = self.groups.get(key)
            expected = {
                worker
                for worker, capacity in (group.workers.items() if group else ())
                if group
                and (ranks := self.said.get(worker))
                and all(_is_over(said, capacity, group.threshold) for said in ranks.values())
            }
            assert set(self.table.busy(key)) == expected
            assert self.told.get(key, set()) == expected, "every change was announced"
            for worker, reason in self.table.busy(key).items():
                assert " is over " in reason, (worker, reason)


def _is_over(said: Said, capacity: KvCapacity, threshold: Thresholds) -> bool:
    _, decode, prefill, used = said
    if threshold.active_decode_blocks_threshold is not None and capacity.total_kv_blocks is not None:
        limit = threshold.active_decode_blocks_threshold * capacity.total_kv_blocks
        if (decode is not None and decode > limit) or (used is not None and used > limit):
            return True
    if prefill is None:
        return False
    limits = [threshold.active_prefill_tokens_threshold]
    if threshold.active_prefill_tokens_threshold_frac is not None:
        batch = 10_000_000 if capacity.max_num_batched_tokens is None else capacity.max_num_batched_tokens
        limits.append(max(0, int(threshold.active_prefill_tokens_threshold_frac * batch)))
    return any(limit is not None and prefill > limit for limit in limits)


TestLoads = Loads.TestCase
TestLoads.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
