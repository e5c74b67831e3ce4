"""The scheduling of steps, on a model that counts: no torch."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from stator.engines.block_ledger import BlockLedger
from stator.engines.sequence import Finish, Sampling, Sequence, TokenChoice
from stator.engines.step_thread import StepResult, StepThread
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(20)


class CountingModel:
    """Token n of a sequence is n. A decode passes only when the test lets it."""

    def __init__(self) -> None:
        self.held: list[Sequence] = []
        self.log: list[str] = []
        self.steps = threading.Semaphore(0)
        self.prefill_error: BaseException | None = None
        self.step_error: BaseException | None = None
        self.outcome: Exception | None = None
        self.check_error: Exception | None = None
        self.threads: set[int] = set()

    def prefill(self, sequence: Sequence, most: int) -> TokenChoice | None:
        self.threads.add(threading.get_ident())
        part = min(most, len(sequence.tokens) - sequence.read)
        self.log.append(f"prefill {part}")
        if self.prefill_error is not None:
            raise self.prefill_error
        sequence.read += part
        if sequence.read < len(sequence.tokens):
            return None
        self.held.append(sequence)
        return TokenChoice(sequence.generated)

    def decode(self) -> list[tuple[Sequence, TokenChoice | Exception]]:
        assert self.steps.acquire(timeout=10), "the test allowed no further step"
        self.log.append(f"decode {len(self.held)}")
        if self.step_error is not None:
            raise self.step_error
        return [(sequence, self.outcome or TokenChoice(sequence.generated)) for sequence in self.held]

    def evict(self, sequence: Sequence) -> None:
        self.log.append("evict")
        sequence.read = 0
        self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        if sequence in self.held:
            self.held.remove(sequence)

    def check(self) -> None:
        self.log.append("check")
        if self.check_error is not None:
            raise self.check_error

    def allow(self, count: int) -> None:
        self.steps.release(count)


class Stage:
    def __init__(self, model: CountingModel, *, blocks: int = 1000, block_size: int = 4, **limits: int) -> None:
        self.model = model
        self.results: list[StepResult] = []
        self.calls = 0
        self.deaths: list[str] = []
        self.ledger = BlockLedger(total=blocks, block_size=block_size)
        self.used: list[int] = []
        self.thread = StepThread(
            model,
            loop=asyncio.get_running_loop(),
            deliver=self._deliver,
            died=self.deaths.append,
            after_step=lambda: self.used.append(self.ledger.used),
            ledger=self.ledger,
            **({"max_running": 4, "max_prefill_tokens": 100} | limits),
        )

    def _deliver(self, results: list[StepResult]) -> None:
        self.calls += 1
        self.results += results

    def tokens(self, sequence: Sequence) -> list[int]:
        return [result.choice.token_id for result in self.results if result.sequence is sequence and result.choice]

    def end(self, sequence: Sequence) -> Finish | Exception | None:
        last = next((result for result in reversed(self.results) if result.sequence is sequence), None)
        return None if last is None else last.finish or last.error

    async def until_ended(self, *sequences: Sequence) -> None:
        await eventually(lambda: all(self.end(sequence) is not None for sequence in sequences))


@asynccontextmanager
async def stage(**limits: int) -> AsyncGenerator[Stage]:
    one = Stage(CountingModel(), **limits)
    try:
        yield one
    finally:
        one.thread.close()
        one.model.allow(100)
        assert await asyncio.to_thread(one.thread.join, 10)


def sequence(prompt: int = 1, *, max_tokens: int = 4, **fields: Any) -> Sequence:
    return Sequence([9] * prompt, sampling=Sampling(), max_tokens=max_tokens, **fields)


async def test_tokens_arrive_in_order_and_end_with_the_finish() -> None:
    async with stage() as it:
        it.model.allow(10)
        one = sequence()
        it.thread.submit(one)
        await it.until_ended(one)
        assert it.tokens(one) == [0, 1, 2, 3]
        assert it.end(one) == Finish("length")
        await eventually(lambda: it.thread.running == 0)
    assert it.model.threads != {threading.get_ident()}


async def test_the_first_token_does_not_wait_for_a_decode() -> None:
    async with stage() as it:
        one = sequence()
        it.thread.submit(one)
        await eventually(lambda: it.tokens(one) == [0])
        assert it.model.log == ["prefill 1"]


async def test_one_call_per_step_for_all_sequences() -> None:
    async with stage() as it:
        sequences = [sequence(max_tokens=6) for _ in range(4)]
        it.thread.submit(sequences[0])
        await eventually(lambda: it.calls == 1)
        for other in sequences[1:]:
            it.thread.submit(other)
        it.model.allow(20)
        await it.until_ended(*sequences)
    # prefill, decode of one; then prefill of three at once and five decodes of up to four
    assert it.calls <= 9


async def test_sequences_join_while_others_run() -> None:
    async with stage() as it:
        one, two = sequence(max_tokens=8), sequence(max_tokens=3)
        it.thread.submit(one)
        it.model.allow(2)
        await eventually(lambda: it.tokens(one) == [0, 1, 2])
        it.thread.submit(two)
        it.model.allow(20)
        await it.until_ended(one, two)
        assert it.tokens(two) == [0, 1, 2]
        assert "decode 2" in it.model.log


async def test_slots_bound_what_runs_and_the_next_takes_the_free_one() -> None:
    async with stage(max_running=2) as it:
        sequences = [sequence(max_tokens=2) for _ in range(5)]
        for one in sequences:
            it.thread.submit(one)
        it.model.allow(20)
        await it.until_ended(*sequences)
        assert max(int(entry.split()[1]) for entry in it.model.log if entry.startswith("decode")) == 2


async def test_long_prompts_are_spread_over_steps() -> None:
    """Ten tokens of prompts per step, in their order, and a decode for the others between."""
    async with stage(max_prefill_tokens=10) as it:
        running = sequence(max_tokens=12)
        it.thread.submit(running)
        await eventually(lambda: it.calls == 1)
        others = [sequence(length, max_tokens=12) for length in (8, 8, 24)]
        for one in others:
            it.thread.submit(one)
        it.model.allow(30)
        await it.until_ended(running, *others)
    prefills = [entry for entry in it.model.log if entry.startswith("prefill")]
    assert prefills[1:] == ["prefill 8", "prefill 2", "prefill 6", "prefill 4", "prefill 10", "prefill 10"]
    first = it.model.log.index("prefill 8")
    decodes = [entry for entry in it.model.log[first:] if entry.startswith("decode")]
    assert decodes[:4] == ["decode 2", "decode 3", "decode 3", "decode 4"]


async def test_a_prompt_may_be_abandoned_while_it_is_read() -> None:
    async with stage(max_prefill_tokens=10) as it:
        running, long, next_one = sequence(max_tokens=100), sequence(1000), sequence(3, max_tokens=1)
        it.thread.submit(running)
        await eventually(lambda: it.calls == 1)
        it.thread.submit(long)
        it.model.allow(3)
        await eventually(lambda: it.model.log[-1] == "prefill 10" and it.thread.running == 2)
        assert it.ledger.used > 250
        it.thread.withdraw(long)
        it.thread.submit(next_one)
        it.model.allow(5)
        await it.until_ended(next_one)
        assert it.tokens(long) == []
        assert long.read < 100
        assert it.thread.running == 1
        assert it.ledger.used < 10


async def test_sequences_wait_until_their_blocks_are_free() -> None:
    """Five blocks of four tokens; the order of the queue is kept."""
    async with stage(blocks=5) as it:
        first, second, third = sequence(8, max_tokens=4), sequence(16, max_tokens=2), sequence(1, max_tokens=1)
        it.thread.submit(first)
        await eventually(lambda: it.thread.running == 1)
        it.thread.submit(second)
        it.thread.submit(third)
        it.model.allow(1)
        await eventually(lambda: len(it.tokens(first)) == 2)
        assert (it.thread.running, it.thread.waiting) == (1, 2)
        it.model.allow(20)
        await it.until_ended(first, second, third)
        assert [result.sequence for result in it.results if result.finish] == [first, third, second]
        await eventually(lambda: it.ledger.used == 0)
        assert it.thread.preemptions == 0
        assert max(it.used) <= 5


async def test_the_youngest_gives_way_when_blocks_run_out() -> None:
    """Two that grow to four blocks each share five: one is read again, with what it has generated, and goes on."""
    async with stage(blocks=5) as it:
        old, young = sequence(4, max_tokens=12), sequence(4, max_tokens=12)
        for one in (old, young):
            it.thread.submit(one)
        it.model.allow(100)
        await it.until_ended(old, young)
        assert it.tokens(old) == it.tokens(young) == list(range(12))
        assert it.end(old) == it.end(young) == Finish("length")
        assert [result.sequence for result in it.results if result.finish] == [old, young]
        assert it.thread.preemptions == 1
        await eventually(lambda: it.thread.running == 0 and it.ledger.used == 0)
        assert max(it.used) <= 5
        again = it.model.log[it.model.log.index("evict") + 1 :]
        assert next(entry for entry in again if entry.startswith("prefill")) != "prefill 4", "the answer is read too"


async def test_who_gave_way_may_be_withdrawn() -> None:
    async with stage(blocks=5) as it:
        old, young = sequence(4, max_tokens=12), sequence(4, max_tokens=12)
        for one in (old, young):
            it.thread.submit(one)
        while not it.thread.preemptions:
            it.model.allow(1)
            await asyncio.sleep(0.001)
        assert it.thread.waiting == 1
        it.thread.withdraw(young)
        it.model.allow(100)
        await it.until_ended(old)
        await eventually(lambda: it.ledger.used == 0)
        assert it.end(young) is None
        assert it.thread.waiting == 0


@pytest.mark.parametrize("waits", [True, False])
async def test_withdrawing_frees_the_place(waits: bool) -> None:
    async with stage(max_running=1) as it:
        one, two = sequence(max_tokens=100), sequence(max_tokens=2)
        it.thread.submit(one)
        await eventually(lambda: it.thread.running == 1)
        it.thread.submit(two)
        if waits:
            it.thread.withdraw(two)
            assert it.thread.waiting == 0
        else:
            it.thread.withdraw(one)
            it.model.allow(10)
            await it.until_ended(two)
            assert it.tokens(two) == [0, 1]


async def test_a_failing_prefill_concerns_its_sequence_alone() -> None:
    async with stage() as it:
        it.model.allow(20)
        it.model.prefill_error = RuntimeError("broken prompt")
        bad = sequence()
        it.thread.submit(bad)
        await it.until_ended(bad)
        assert str(it.end(bad)) == "broken prompt"
        it.model.prefill_error = None
        good = sequence()
        it.thread.submit(good)
        await it.until_ended(good)
        assert it.end(good) == Finish("length")


@pytest.mark.parametrize("whole", [True, False])
async def test_the_thread_outlives_a_failing_step(whole: bool) -> None:
    """Whether the model raises or says which sequences failed."""
    async with stage() as it:
        error = RuntimeError("out of memory")
        it.model.step_error, it.model.outcome = (error, None) if whole else (None, error)
        bad = sequence()
        it.thread.submit(bad)
        it.model.allow(1)
        await it.until_ended(bad)
        assert isinstance(it.end(bad), RuntimeError)
        await eventually(lambda: it.thread.running == 0)
        assert it.model.held == []
        it.model.step_error = it.model.outcome = None
        good = sequence()
        it.thread.submit(good)
        it.model.allow(20)
        await it.until_ended(good)
        assert it.end(good) == Finish("length")


async def test_a_model_that_still_runs_is_kept_after_failures() -> None:
    async with stage() as it:
        it.model.prefill_error = RuntimeError("broken prompt")
        for _ in range(7):
            bad = sequence()
            it.thread.submit(bad)
            await it.until_ended(bad)
        assert it.model.log.count("check") == 2
        assert it.deaths == []


async def test_a_model_that_does_not_run_any_more_is_the_end() -> None:
    async with stage() as it:
        it.model.prefill_error = it.model.check_error = RuntimeError("device-side assert")
        for _ in range(3):
            assert it.deaths == []
            it.thread.submit(bad := sequence())
            await it.until_ended(bad)
        await eventually(lambda: it.deaths == ["RuntimeError: device-side assert"])
        assert await asyncio.to_thread(it.thread.join, 5)


async def test_only_failures_in_a_row_are_suspicious() -> None:
    async with stage() as it:
        it.model.check_error = RuntimeError("not to be called")
        for number in range(8):
            it.model.prefill_error = RuntimeError("broken prompt") if number % 2 else None
            it.thread.submit(one := sequence(max_tokens=1))
            await it.until_ended(one)
        assert "check" not in it.model.log


async def test_a_thread_that_breaks_says_so() -> None:
    async with stage() as it:
        it.model.step_error = SystemExit("gone")
        it.thread.submit(sequence())
        it.model.allow(1)
        await eventually(lambda: it.deaths == ["SystemExit: gone"])
        assert await asyncio.to_thread(it.thread.join, 5)


async def test_closing_releases_what_runs() -> None:
    async with stage() as it:
        it.thread.submit(sequence(max_tokens=1000))
        await eventually(lambda: it.thread.running == 1)
    assert it.model.held == []
    assert it.thread.running == 0


@pytest.mark.parametrize(
    ("fields", "tokens", "finish"),
    [
        ({"eos_ids": frozenset({7})}, [5, 7], Finish("eos", 7)),
        ({"stop_ids": frozenset({7})}, [5, 7], Finish("stop", 7)),
        ({"stop_ids": frozenset({7}), "min_tokens": 3}, [5, 7, 5, 7], Finish("stop", 7)),
        ({"max_tokens": 2}, [5, 7], Finish("length")),
        ({"max_tokens": 2, "eos_ids": frozenset({7})}, [5, 7], Finish("eos", 7)),
    ],
)
def test_what_ends_a_sequence(fields: dict[str, Any], tokens: list[int], finish: Finish) -> None:
    one = sequence(3, **({"max_tokens": 10} | fields))
    ends = [one.append(token) for token in tokens]
    assert ends == [None] * (len(tokens) - 1) + [finish]
    assert one.tokens == [9, 9, 9, *tokens]
    assert one.generated == len(tokens)
