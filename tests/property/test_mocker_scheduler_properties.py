"""The simulated scheduler, which skips what is equal, against one that leaves nothing out; and what holds whatever happens to it."""

from itertools import count

from hypothesis import given, settings
from hypothesis import strategies as st

from property.plain_mocker import PlainScheduler, PlainSequence
from stator.mocker.blocks import BlockPool, Stored
from stator.mocker.scheduler import Limits, Scheduler
from stator.mocker.sequence import Phase, Sequence
from stator.mocker.timing import FormulaTiming
from stator.mocker.workload import Arrival, block_hashes

BLOCK = 4
LONGEST = 60


@st.composite
def workloads(draw: st.DrawFn) -> list[Arrival]:
    """Up to a dozen requests within two seconds; many share a beginning with others."""
    arrivals: list[Arrival] = []
    for number in range(draw(st.integers(1, 12))):
        prompt = draw(st.integers(1, LONGEST - 20))
        shared = draw(st.integers(0, prompt))
        arrivals.append(
            Arrival(
                time=draw(st.integers(0, 2000)) / 1000,
                prompt_tokens=prompt,
                output_tokens=draw(st.integers(1, 20)),
                content=((draw(st.integers(0, 1)), shared), (10 + number, prompt - shared)),
            )
        )
    return sorted(arrivals, key=lambda arrival: arrival.time)


@st.composite
def limits(draw: st.DrawFn) -> tuple[int, Limits]:
    """A capacity that any one request fits into, and the limits."""
    seqs = draw(st.integers(1, 6))
    chunked = draw(st.booleans())
    return draw(st.integers(LONGEST // BLOCK + 1, 40)), Limits(
        block_size=BLOCK,
        max_num_seqs=seqs,
        max_num_batched_tokens=draw(st.integers(max(seqs, 3), 50)) if chunked else LONGEST + 1 + seqs,
        prefix_caching=draw(st.booleans()),
        chunked_prefill=chunked,
        oldest_first=draw(st.booleans()),
        reserve=draw(st.sampled_from([0, 0, 3])),
    )


def hashes_of(number: int, arrival: Arrival) -> list[int]:
    return block_hashes(arrival, number=number, block_size=BLOCK)


def plainly(arrivals: list[Arrival], capacity: int, bounds: Limits) -> list[PlainSequence]:
    scheduler = PlainScheduler(capacity, FormulaTiming(capacity=capacity), bounds)
    sequences = [
        PlainSequence(
            number=number,
            submitted=round(arrival.time * 1e9),
            prompt=arrival.prompt_tokens,
            max_tokens=arrival.output_tokens,
            names=hashes_of(number, arrival),
        )
        for number, arrival in enumerate(arrivals)
    ]
    coming, now = list(sequences), 0
    while coming or scheduler.waiting or scheduler.running:
        if not scheduler.waiting and not scheduler.running:
            now = max(now, coming[0].submitted)
        while coming and coming[0].submitted <= now:
            scheduler.waiting.append(coming.pop(0))
        now = scheduler.one_pass(now)
    return sequences


class Fast:
    """The real scheduler, with as many passes at once as it offers, or fewer."""

    def __init__(self, capacity: int, bounds: Limits, *, most_passes: int = 1 << 30) -> None:
        self.pool = BlockPool(capacity, record=bounds.prefix_caching)
        self.scheduler = Scheduler(self.pool, FormulaTiming(capacity=capacity), bounds)
        self.scheduler.statistics.gaps = {}
        self.most_passes = most_passes
        self.own = count(1 << 62)
        self.known: set[int] = set()
        """names in the cache, by its events"""
        self.now = 0

    def sequence(self, number: int, arrival: Arrival) -> Sequence:
        return Sequence(
            prompt_length=arrival.prompt_tokens,
            max_tokens=arrival.output_tokens,
            hashes=hashes_of(number, arrival) if self.scheduler.limits.prefix_caching else [],
            hash_of_next=lambda _: next(self.own),
            index=number,
        )

    def run(self, arrivals: list[Arrival]) -> list[Sequence]:
        sequences = [self.sequence(number, arrival) for number, arrival in enumerate(arrivals)]
        coming = [(round(arrivals[each.index].time * 1e9), each) for each in sequences]
        while True:
            while coming and coming[0][0] <= self.now:
                self.scheduler.submit(coming[0][1], coming.pop(0)[0])
            if not self.step(coming[0][0] if coming else None):
                if not coming:
                    return sequences
                self.now = coming[0][0]

    def step(self, until: int | None) -> bool:
        """Passes until the one that is on at `until` is over; False: there is nothing to do."""
        plan = self.scheduler.start(self.now)
        self.look()
        if plan is None:
            return False
        passes = min(plan.repeat, self.most_passes)
        if until is not None and plan.duration:
            passes = max(1, min(passes, -(-(until - self.now) // plan.duration)))
        self.now = self.scheduler.finish(passes).end
        self.look()
        return True

    def look(self) -> None:
        """What must hold at any time."""
        pool = self.pool
        assert 0 <= pool.used <= pool.capacity
        assert pool.used + pool.reusable <= pool.capacity
        for change in pool.take_changes():
            if isinstance(change, Stored):
                assert self.known.isdisjoint(change.hashes)
                assert change.parent_hash is None or change.parent_hash in self.known
                self.known.update(change.hashes)
            else:
                assert self.known.issuperset(change.hashes)
                self.known.difference_update(change.hashes)
        assert all(pool.find(name) is not None for name in self.known)


@settings(max_examples=300, deadline=None)
@given(workloads(), limits())
def test_it_is_the_plain_one_faster(arrivals: list[Arrival], bounds: tuple[int, Limits]) -> None:
    plain = plainly(arrivals, *bounds)
    fast = Fast(*bounds)
    gaps: dict[int, int] = {}
    for each, found in zip(plain, fast.run(arrivals), strict=True):
        assert found.phase is (Phase.REJECTED if each.rejected else Phase.FINISHED)
        assert (found.first_token_at, found.ended_at) == (each.times[0], each.times[-1])
        assert (found.cached, found.preemptions) == (each.cached, each.preemptions)
        for before, after in zip(each.times, each.times[1:], strict=False):
            gaps[after - before] = gaps.get(after - before, 0) + 1
    assert {gap: times for gap, times in (fast.scheduler.statistics.gaps or {}).items() if times} == gaps
    assert fast.scheduler.statistics.tokens == sum(len(each.times) for each in plain)
    assert fast.pool.used == 0


@settings(max_examples=100, deadline=None)
@given(workloads(), limits(), st.integers(1, 3))
def test_passes_may_be_taken_in_any_portions(arrivals: list[Arrival], bounds: tuple[int, Limits], most: int) -> None:
    whole = Fast(*bounds).run(arrivals)
    pieces = Fast(*bounds, most_passes=most).run(arrivals)
    assert [(each.first_token_at, each.ended_at) for each in whole] == [(each.first_token_at, each.ended_at) for each in pieces]


@settings(max_examples=150, deadline=None)
@given(workloads(), limits(), st.data())
def test_withdrawing_frees_everything_at_any_time(
    arrivals: list[Arrival], bounds: tuple[int, Limits], data: st.DataObject
) -> None:
    fast = Fast(*bounds)
    here: list[Sequence] = []
    for number, arrival in enumerate(arrivals):
        here.append(fast.sequence(number, arrival))
        fast.scheduler.submit(here[-1], fast.now)
        for _ in range(data.draw(st.integers(0, 6))):
            plan = fast.scheduler.start(fast.now)
            if plan is not None and data.draw(st.booleans()):  # in the middle of a pass
                fast.scheduler.withdraw(data.draw(st.sampled_from(here)), fast.now)
                fast.look()
            if plan is not None:
                fast.now = fast.scheduler.finish(data.draw(st.integers(1, plan.repeat))).end
            fast.look()
    for each in data.draw(st.permutations(here)):
        fast.scheduler.withdraw(each, fast.now)
        fast.look()
        assert not each.blocks and not each.loose
    assert (fast.pool.used, fast.scheduler.running, fast.scheduler.waiting) == (0, 0, 0)
    assert fast.scheduler.start(fast.now) is None
