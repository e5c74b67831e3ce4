"""The simulated engine in virtual time: nothing here waits."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import msgspec
import pytest

from stator.errors import EngineError, Overloaded
from stator.kv.hashing import local_hashes, sequence_hashes
from stator.kv.sources import PushSource
from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, Routing, SamplingOptions, StopConditions
from stator.mocker.engine import MockerEngine, MockerOptions
from stator.runtime.context import Context
from stator.testing.manual_loop import ManualLoop
from stator.worker.engine import EngineConfig
from stator.worker.snapshot import ComponentSnapshot

STEP = 1e-4
PROMPT = list(range(1, 1025))


class Snapshots:
    """A sink that keeps everything."""

    def __init__(self, ranks: int) -> None:
        self.dp_ranks = range(ranks)
        self.seen: list[tuple[int, ComponentSnapshot]] = []

    def publish(self, dp_rank: int, snapshot: ComponentSnapshot) -> None:
        self.seen.append((dp_rank, snapshot))


class KvEvents:
    """A sink that keeps everything."""

    def __init__(self) -> None:
        self.stored_blocks: list[tuple[list[int], list[int], int | None, str | None]] = []
        self.removed_blocks: list[int] = []

    def stored(
        self, *, token_ids: Any, block_hashes: Any, parent_hash: int | None = None, lora_name: str | None = None, tier: str = ""
    ) -> None:
        self.stored_blocks.append((list(token_ids), list(block_hashes), parent_hash, lora_name))

    def removed(self, block_hashes: Any, *, tier: str = "") -> None:
        self.removed_blocks.extend(block_hashes)

    def cleared(self) -> None: ...


class Asked:
    """A request and what came of it: `items` with the loop's time since it was asked, and `error`."""

    def __init__(self, house: "House", request: PreprocessedRequest) -> None:
        self.items: list[tuple[float, EngineOutput]] = []
        self.error: Exception | None = None
        self.context = Context(f"request {id(self)}")
        self._house = house
        self._request = request
        self._began = house.loop.time()
        self.task = house.loop.spawn(self._read())

    async def _read(self) -> None:
        try:
            async for item in self._house.engine.generate(self._request, self.context):
                self.items.append((self._house.loop.time() - self._began, item))
        except Exception as error:
            self.error = error

    def stop(self) -> None:
        """As a worker does it: the context first, then `abort`."""
        self.context.stop()
        self._house.loop.spawn(self._house.engine.abort(self.context))

    @property
    def tokens(self) -> list[int]:
        return [token for _, item in self.items for token in item.token_ids]

    @property
    def times(self) -> list[float]:
        """When each token came, in seconds."""
        return [when for when, item in self.items for _ in item.token_ids]

    @property
    def last(self) -> EngineOutput:
        return self.items[-1][1]


class House:
    """An engine on a manual loop, whose clock is the loop's, or `ahead` of it."""

    def __init__(self, loop: ManualLoop, options: MockerOptions) -> None:
        self.loop = loop
        self.ahead = 0.0
        self.engine = MockerEngine(options, clock=self)
        self.reports: list[str] = []
        self.engine.follow_progress(self.reports.append)

    def monotonic(self) -> float:
        return self.loop.monotonic() + self.ahead

    def wall(self) -> float:
        return self.loop.wall()

    def start(self) -> EngineConfig:
        return self.loop.run_until_complete(self.engine.start(1))

    def ask(self, prompt: list[int] = PROMPT, max_tokens: int | None = 10, *, settle: bool = True, **more: Any) -> Asked:
        routing = more.pop("routing", None)
        request = PreprocessedRequest(
            token_ids=prompt,
            stop_conditions=StopConditions(max_tokens=max_tokens),
            sampling_options=SamplingOptions(**more),
            **({"routing": Routing(**routing)} if routing else {}),
        )
        asked = Asked(self, request)
        if settle:
            self.loop.settle()
        return asked

    def run(self, seconds: float, step: float = STEP) -> None:
        """Let time pass in small steps."""
        end = self.loop.time() + seconds
        while self.loop.time() < end - step / 2:
            self.loop.pass_time(step)

    def finish(self, *asked: Asked) -> None:
        for _ in range(2000):
            if all(each.task.done() for each in asked):
                return
            self.run(0.05, 0.01)
        raise AssertionError("it does not end")

    @property
    def used(self) -> int:
        return sum(rank.scheduler.pool.used for rank in self.engine.ranks)


@contextmanager
def house(**options: Any) -> Generator[House]:
    """An engine that has started."""
    loop = ManualLoop()
    made = House(loop, MockerOptions(**options))
    try:
        made.start()
        yield made
        loop.finish(made.engine.cleanup())
        assert not loop.failures
    finally:
        loop.close()


def test_tokens_come_when_the_formulas_say() -> None:
    with house() as home:
        asked = home.ask()
        home.run(0.1)
    assert len(asked.items) == 10
    assert asked.times[0] == pytest.approx(0.038283, abs=2 * STEP)
    assert asked.times[-1] == pytest.approx(0.090447, abs=2 * STEP)
    assert [item.finish_reason for _, item in asked.items] == [None] * 9 + ["length"]


def test_late_timers_add_up_to_nothing() -> None:
    with house() as home:
        asked = home.ask(max_tokens=1000)
        home.run(7, step=0.02)  # every timer is late, and several passes are over each time
    exact = 0.0382834 + 27 * 0.005796
    assert asked.times[27] == pytest.approx(exact, abs=0.021)
    rank_busy = 0.0382834 + sum(0.0057927 + 0.0000032932 * (1 + made // 64) for made in range(999))
    assert asked.times[-1] == pytest.approx(rank_busy, abs=0.025)
    assert len(asked.tokens) == 1000
    assert len(asked.items) < 400, "what is there is read at once"


def test_a_process_that_was_stopped_does_not_catch_up() -> None:
    with house() as home:
        asked = home.ask(max_tokens=1000)
        home.run(0.1, step=0.001)
        before = len(asked.tokens)
        home.ahead += 5.0
        home.run(0.01, step=0.001)
        assert len(asked.tokens) - before < 5, "862 passes would have been over"


def test_a_request_is_in_the_first_pass_after_it_came_however_late_timers_are() -> None:
    with house() as home:
        scheduler = home.engine.ranks[0].scheduler
        begin = scheduler._begin  # pyright: ignore[reportPrivateUsage]  # where requests get their slots
        waits: list[int] = []

        def watched(sequence: Any, cached: int, now: int) -> None:
            waits.append(now - sequence.submitted_at)
            begin(sequence, cached, now)

        scheduler._begin = watched  # pyright: ignore[reportPrivateUsage]
        asked = [home.ask([1] * 64, 500)]
        home.run(0.1)
        for number in range(8):
            home.ahead += 0.0511  # eight passes are over, and no timer has said so
            asked.append(home.ask([2 + number] * 10, 2))
            home.ahead += 0.0511
            home.run(0.1)
        home.finish(*asked)
    assert len(waits) == 9
    assert all(0 <= wait < 6_000_000 for wait in waits), "no longer than a pass"


def test_a_timer_that_is_early_is_set_again() -> None:
    with house() as home:
        asked = home.ask(max_tokens=3)
        home.ahead -= 0.0004
        home.run(0.1)
    assert asked.times[0] == pytest.approx(0.0383 + 0.001, abs=3 * STEP)


def test_requests_of_one_turn_share_the_first_pass() -> None:
    with house() as home:
        first, second = (home.ask(list(range(at, at + 100)), 1, settle=False) for at in (0, 200))
        home.run(0.05)
        assert first.times == second.times
        assert home.engine.ranks[0].scheduler.statistics.passes == 1


def test_a_prompt_that_is_cached_comes_at_once_and_is_told() -> None:
    with house() as home:
        first = home.ask()
        home.finish(first)
        second = home.ask()
        home.run(0.1)
    assert second.times[0] == pytest.approx(0.005793, abs=2 * STEP)
    usage = second.last.completion_usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (1024, 10, 1034)
    assert usage.prompt_tokens_details == {"cached_tokens": 1024}
    assert second.tokens == first.tokens


def test_without_a_cache_nothing_is_said_of_it() -> None:
    with house(enable_prefix_caching=False) as home:
        asked = home.ask()
        home.finish(asked)
        assert home.engine.kv_event_sources() == ()
        usage = asked.last.completion_usage
        assert usage is not None and usage.prompt_tokens_details is None


def test_answers_do_not_depend_on_who_else_is_there() -> None:
    with house() as home:
        alone = home.ask([5, 6, 7], 40)
        home.finish(alone)
        crowd = [home.ask([each] * 300, 50) for each in range(20)]
        among = home.ask([5, 6, 7], 40)
        home.finish(among, *crowd)
    assert among.tokens == alone.tokens
    assert len({tuple(each.tokens) for each in crowd}) == 20
    with house(seed=1) as home:
        other = home.ask([5, 6, 7], 40)
        seeded = home.ask([5, 6, 7], 40, seed=3)
        home.finish(other, seeded)
    assert len({tuple(each.tokens) for each in (alone, other, seeded)}) == 3


def test_the_built_in_tokenizer_gets_letters_and_the_reference_s_ids_are_a_choice() -> None:
    with house() as home:
        asked = home.ask()
        home.finish(asked)
    assert all(chr(token).islower() or token == 32 for token in asked.tokens)
    with house(vocabulary="reference") as home:
        asked = home.ask()
        home.finish(asked)
    assert all(1000 <= token < 2000 for token in asked.tokens)


def test_a_stop_frees_slot_and_blocks_at_once() -> None:
    with house() as home:
        asked = home.ask(max_tokens=1000)
        home.run(0.06)
        assert home.used == 17
        asked.stop()
        home.loop.settle()
        assert home.used == 0
        assert asked.last.finish_reason == "cancelled"
        usage = asked.last.completion_usage
        assert usage is not None and usage.completion_tokens == len(asked.tokens) == 4


def test_a_stop_in_the_middle_of_a_prompt() -> None:
    with house() as home:
        asked = home.ask(list(range(100_000)), 10)
        home.run(0.3)
        assert home.used == 2 * 8192 // 64
        asked.stop()
        home.loop.settle()
        assert home.used == 0
        assert [item.token_ids for _, item in asked.items] == [[]]
        assert asked.last.finish_reason == "cancelled"


def test_a_stop_frees_them_even_if_nobody_reads() -> None:
    with house() as home:
        context = Context("unread")
        request = PreprocessedRequest(token_ids=PROMPT, stop_conditions=StopConditions(max_tokens=1000))
        stream = aiter(home.engine.generate(request, context))
        assert home.loop.finish(anext(stream)).finish_reason is None  # pyright: ignore[reportArgumentType]
        assert home.used > 0
        context.stop()
        home.loop.finish(home.engine.abort(context))
        assert home.used == 0
        assert home.loop.finish(anext(stream)).finish_reason == "cancelled"  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("after", [0.0, 0.01, 0.06, 0.3])
def test_a_kill_frees_slot_and_blocks_at_once(after: float) -> None:
    with house() as home:
        asked, other = home.ask(max_tokens=1000), home.ask(list(range(30_000)), 5)
        home.run(after)
        for each in (asked, other):
            each.task.cancel()
        home.loop.settle()
        assert home.used == 0
        assert [rank.load for rank in home.engine.ranks] == [0]
        again = home.ask([1, 2], 2)
        home.finish(again)
        assert len(again.tokens) == 2


def test_a_reader_that_pauses_costs_nobody_anything() -> None:
    with house() as home:
        request = PreprocessedRequest(token_ids=PROMPT, stop_conditions=StopConditions(max_tokens=50))
        slow = aiter(home.engine.generate(request, Context("slow")))
        first = home.loop.spawn(anext(slow))  # pyright: ignore[reportArgumentType]  # a coroutine, as engines are generators
        other = home.ask(list(range(100)), 50)
        home.finish(other)
        assert len(first.result().token_ids) == 1
        rest = home.loop.finish(anext(slow))  # pyright: ignore[reportArgumentType]
        assert len(rest.token_ids) == 49, "everything else in one item"
        assert rest.finish_reason == "length"
        home.loop.finish(slow.aclose())  # pyright: ignore[reportAttributeAccessIssue]


def test_the_length_of_an_answer() -> None:
    with house(num_gpu_blocks=4, block_size=16, default_max_tokens=7) as home:
        by_default, none, limited = home.ask([1, 2], None), home.ask([1, 2], 0), home.ask(list(range(60)), 1000)
        home.finish(by_default, none, limited)
        assert [len(each.tokens) for each in (by_default, none, limited)] == [7, 0, 4]
        assert all(each.last.finish_reason == "length" for each in (by_default, none, limited))


@pytest.mark.parametrize("prompt", [[], list(range(64)), [-1], [2**32]])
def test_prompts_that_cannot_be_answered_are_the_request_s_fault(prompt: list[int]) -> None:
    with house(num_gpu_blocks=4, block_size=16) as home:
        asked = home.ask(prompt)
        home.finish(asked)
        assert isinstance(asked.error, EngineError) and asked.error.kind == "InvalidArgument"


def test_ranks_take_requests_in_turn_or_as_asked() -> None:
    with house(data_parallel_size=3) as home:
        chosen = [home.ask([each] * 100, 200) for each in range(4)]
        assert [rank.load for rank in home.engine.ranks] == [2, 1, 1]
        chosen.append(home.ask([9] * 100, 200, routing={"dp_rank": 1}))
        assert [rank.load for rank in home.engine.ranks] == [2, 2, 1]
        chosen.append(home.ask([10] * 100, 200))
        assert [rank.load for rank in home.engine.ranks] == [2, 2, 2], "to the one with the fewest"
        home.finish(*chosen)
        for wrong in (3, -1):
            asked = home.ask([1], routing={"dp_rank": wrong})
            home.finish(asked)
            assert isinstance(asked.error, EngineError) and asked.error.kind == "InvalidArgument"
            assert "from 0 to 2" in str(asked.error)


def test_too_many_requests_are_refused_at_once() -> None:
    with house(max_num_seqs=1, max_waiting=1) as home:
        running = [home.ask([each] * 100, 100) for each in range(2)]
        with pytest.raises(Overloaded, match="2 requests"):
            home.engine.generate(PreprocessedRequest(token_ids=[1]), Context("third"))
        home.finish(*running)
        home.engine.generate(PreprocessedRequest(token_ids=[1]), Context("fourth"))


def test_snapshots_tell_each_pass_and_the_end() -> None:
    with house(data_parallel_size=2, num_gpu_blocks=100) as home:
        assert list(home.engine.snapshot_ranks()) == [0, 1]
        sink = Snapshots(2)
        home.engine.attach_snapshots(sink)
        idle = ComponentSnapshot(kv_used_blocks=0, kv_total_blocks=100, gpu_cache_usage=0.0)
        assert sink.seen == [(0, idle), (1, idle)], "so that it is known from the beginning"
        home.finish(home.ask(list(range(128)), 10, routing={"dp_rank": 1}))
        found = [snapshot for rank, snapshot in sink.seen[2:] if rank == 1]
        assert len(found) == len(sink.seen) - 2, "the other rank has nothing new"
        assert {snapshot.kv_used_blocks for snapshot in found} == {2, 3, 0}
        assert found[-1] == ComponentSnapshot(kv_used_blocks=0, kv_total_blocks=100, gpu_cache_usage=0.0, kv_cache_hit_rate=0.0)
        assert max(snapshot.gpu_cache_usage for snapshot in found) == 0.03
        count = len(sink.seen)
        home.run(1, step=0.01)
        assert len(sink.seen) == count, "an idle rank is silent"
        home.finish(home.ask(list(range(128)), 10, routing={"dp_rank": 1}))
        assert sink.seen[-1][1].kv_cache_hit_rate == 0.5


def test_kv_events_tell_what_is_in_the_cache() -> None:
    with house(num_gpu_blocks=8, block_size=4, data_parallel_size=2) as home:
        sinks = [KvEvents(), KvEvents()]
        sources = home.engine.kv_event_sources()
        assert [source.dp_rank for source in sources] == [0, 1]
        for source, sink in zip(sources, sinks, strict=True):
            assert isinstance(source, PushSource)
            source.on_ready(sink)
        prompt = list(range(10))
        asked = home.ask(prompt, 12, routing={"dp_rank": 1})
        home.finish(asked)
        whole = (prompt + asked.tokens)[:20]
        names = sequence_hashes(local_hashes(whole, block_size=4))
        stored = sinks[1].stored_blocks
        assert [token for tokens, _, _, _ in stored for token in tokens] == whole, "answers too, as far as blocks are full"
        assert [name for _, hashes, _, _ in stored for name in hashes] == names
        assert [parent for _, _, parent, _ in stored] == [None, *names[1:-1]]
        assert sinks[0].stored_blocks == []
        again = home.ask(whole, 2, routing={"dp_rank": 1})
        home.finish(again)
        usage = again.last.completion_usage
        assert usage is not None and usage.prompt_tokens_details == {"cached_tokens": 20}, "the next turn of a conversation"
        home.finish(home.ask(list(range(50, 70)), 2, routing={"dp_rank": 1, "lora_name": "x"}))
        assert sinks[1].removed_blocks == [names[4], names[3], names[2]], "leaves first"
        assert stored[-1][3] == "x"


def test_a_preempted_request_goes_on_where_it_was() -> None:
    with house(num_gpu_blocks=13) as home:
        old, new = home.ask([1] * 256, 200), home.ask([2] * 256, 200)
        home.finish(old, new)
        assert home.engine.ranks[0].scheduler.statistics.preemptions > 0
        assert len(old.tokens) == len(new.tokens) == 200
        assert max(after - before for before, after in zip(new.times, new.times[1:], strict=False)) > 1.9
    with house() as home:
        alone = home.ask([2] * 256, 200)
        home.finish(alone)
        assert new.tokens == alone.tokens


def test_the_card_says_what_there_is() -> None:
    loop = ManualLoop()
    home = House(loop, MockerOptions(num_gpu_blocks=100, block_size=32, max_num_seqs=7, data_parallel_size=2, name="mine"))
    config = home.start()
    loop.finish(home.engine.cleanup())
    loop.close()
    assert msgspec.structs.asdict(config) | {"card": None} == {
        "model": "mine",
        "card": None,
        "served_name": "mine",
        "context_length": 3200,
        "kv_cache_block_size": 32,
        "total_kv_blocks": 100,
        "max_num_seqs": 7,
        "max_num_batched_tokens": 8192,
        "data_parallel_size": 2,
        "data_parallel_start_rank": 0,
        "runtime_data": None,
    }
    assert (config.card.display_name, config.card.kv_cache_block_size) == ("mine", 32)


def test_a_start_may_take_its_time() -> None:
    loop = ManualLoop()
    home = House(loop, MockerOptions(startup_time=30))
    starting = loop.spawn(home.engine.start(1))
    loop.pass_time(29.9)
    assert not starting.done()
    assert home.reports == ["simulating a start of 30 s"]
    loop.pass_time(0.2)
    loop.run_until_complete(starting)
    loop.finish(home.engine.cleanup())
    loop.close()


def test_the_engine_may_die() -> None:
    with house(fail_after=1.0) as home:
        failed = home.loop.spawn(home.engine.failed())
        asked = home.ask(max_tokens=1000)
        home.run(0.9, step=0.01)
        assert not failed.done() and not asked.task.done()
        home.run(0.2, step=0.01)
        assert "died 1 s after its start" in failed.result()
        late = home.ask()
        for each in (asked, late):
            assert isinstance(each.error, EngineError) and each.error.kind == "EngineShutdown"
            assert "fail_after" in str(each.error)


def test_a_pass_that_fails_is_the_end_of_the_engine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with house() as home:
        failed = home.loop.spawn(home.engine.failed())
        asked = home.ask(max_tokens=1000)
        home.run(0.05)

        def broken(passes: int) -> None:
            raise ZeroDivisionError("no more")

        monkeypatch.setattr(home.engine.ranks[0].scheduler, "finish", broken)
        home.run(0.01)
        assert failed.result() == "a pass of rank 0 failed: ZeroDivisionError: no more"
        assert isinstance(asked.error, EngineError) and asked.error.kind == "EngineShutdown"
        assert "a pass of rank 0 failed" in caplog.text


def test_cleanup_ends_what_runs() -> None:
    with house() as home:
        asked, unread = home.ask(max_tokens=1000), home.engine.generate(PreprocessedRequest(token_ids=[1]), Context("unread"))
        home.run(0.05)
        home.loop.finish(home.engine.cleanup())
        assert isinstance(asked.error, EngineError) and asked.error.kind == "EngineShutdown"
        with pytest.raises(EngineError, match="not running"):
            home.loop.finish(anext(aiter(unread)))  # pyright: ignore[reportArgumentType]
        home.run(1, step=0.1)
        assert home.used == 0
    asyncio.run(MockerEngine().cleanup())
