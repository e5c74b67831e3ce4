"""Continuous batching in virtual time: the reference's numbers, and each rule by itself (`spec/50 §23`)."""

from itertools import count

import pytest

from stator.mocker.options import MockerOptions
from stator.mocker.scheduler import Scheduler
from stator.mocker.sequence import Phase, Sequence

MS = 1_000_000
own = count(1 << 62)


def scheduler(**options: object) -> Scheduler:
    chosen = MockerOptions(**options)  # pyright: ignore[reportArgumentType]
    return chosen.scheduler(chosen.timing(), record=True)


def sequence(prompt: int, answer: int, content: int | None = None) -> Sequence:
    """A prompt of `content`, or like no other; blocks have 64 tokens."""
    names = [next(own) if content is None else (content << 32) + index for index in range(prompt // 64)]
    return Sequence(prompt_length=prompt, max_tokens=answer, hashes=names, hash_of_next=lambda _: next(own))


def run(ranks: Scheduler, *sequences: Sequence, now: int = 0) -> int:
    """Submit all and let passes run until nothing is left; the time of the end."""
    for each in sequences:
        ranks.submit(each, now)
    while (plan := ranks.start(now)) is not None:
        now = ranks.finish(plan.repeat).end
    return now


def ttft(each: Sequence) -> float:
    return (each.first_token_at - each.submitted_at) / MS


def test_one_prompt_of_1024_tokens() -> None:
    one = sequence(1024, 10)
    assert run(scheduler(), one) == 38_283_432 + 9 * 5_796_013
    assert ttft(one) == pytest.approx(38.2834, abs=1e-4)
    assert (one.ended_at - one.first_token_at) / 9 / MS == pytest.approx(5.7960, abs=1e-4)


def test_two_prompts_of_6000_tokens_share_a_pass_of_8192() -> None:
    first, second = sequence(6000, 4), sequence(6000, 4)
    run(scheduler(), first, second)
    assert ttft(first) == pytest.approx(175.3006, abs=1e-4)
    assert second.first_token_at > first.first_token_at


def test_without_chunks_the_second_prompt_waits() -> None:
    first, second = sequence(6000, 4), sequence(6000, 4)
    run(scheduler(enable_chunked_prefill=False), first, second)
    assert ttft(first) == pytest.approx(128.8070, abs=1e-4)
    assert ttft(second) == pytest.approx(257.9214, abs=1e-4)


def test_a_prompt_that_is_in_the_cache_costs_nothing() -> None:
    rank = scheduler()
    end = run(rank, sequence(1024, 3, 1))
    again = sequence(1024, 3, 1)
    run(rank, again, now=end)
    assert ttft(again) == pytest.approx(5.7927, abs=1e-4)
    assert again.cached == 1024
    assert rank.hit_rate == 0.5


def test_only_full_blocks_are_found() -> None:
    rank = scheduler()
    end = run(rank, sequence(1000, 3, 1))
    again = sequence(1000, 3, 1)
    run(rank, again, now=end)
    assert again.cached == 960
    assert ttft(again) == pytest.approx(22.902151, abs=1e-6), "40 tokens are computed"


def test_equal_prompts_of_one_pass_are_computed_once() -> None:
    rank = scheduler()
    one, two = sequence(1024, 3, 1), sequence(1024, 3, 1)
    run(rank, one, two)
    assert ttft(one) == ttft(two) == pytest.approx(38.283432, abs=1e-6)
    assert rank.statistics.computed == 1024
    assert rank.statistics.most_used == 18, "16 shared blocks and one more for the answer of each"


def test_without_a_cache_nothing_is_found_and_there_is_no_hit_rate() -> None:
    rank = scheduler(enable_prefix_caching=False)
    run(rank, sequence(1024, 3, 1))
    again = sequence(1024, 3, 1)
    run(rank, again)
    assert again.cached == 0
    assert rank.hit_rate is None
    assert rank.pool.take_changes() == []


def test_several_prompts_count_by_their_means() -> None:
    rank = scheduler()
    run(rank, sequence(1001, 1), sequence(3000, 1))
    assert rank.statistics.computed == 2 * (4001 // 2)


def test_equal_passes_are_planned_at_once() -> None:
    rank = scheduler()
    rank.submit(sequence(100, 500), 0)
    first = rank.start(0)
    assert first is not None and first.repeat == 1, "the prompt"
    second = rank.start(rank.finish().end)
    assert second is not None and second.repeat == 28, "until 128 tokens are full, and the next one needs a third block"


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    rank = scheduler(max_num_batched_tokens=256)
    short = sequence(10, 50)
    rank.submit(short, 0)
    rank.start(0)
    now = rank.finish().end
    rank.submit(sequence(1000, 1), now)
    for made in range(2, 6):
        plan = rank.start(now)
        assert plan is not None and plan.duration > 20 * MS, "255 tokens of the prompt are in each pass"
        now = rank.finish().end
        assert rank.made(short) == made


def test_no_more_than_max_num_seqs_run() -> None:
    rank = scheduler(max_num_seqs=2)
    for _ in range(5):
        rank.submit(sequence(10, 3), 0)
    rank.start(0)
    assert (rank.running, rank.waiting) == (2, 3)


def test_what_does_not_fit_waits_for_blocks() -> None:
    rank = scheduler(num_gpu_blocks=20)
    big, next_one = sequence(1024, 2), sequence(320, 2)
    rank.submit(big, 0)
    rank.submit(next_one, 0)
    rank.start(0)
    assert (rank.running, rank.waiting) == (1, 1), "16 blocks are in use, 5 are needed"
    run(rank, now=rank.finish().end)
    assert next_one.phase is Phase.FINISHED
    assert rank.statistics.preemptions == 0


@pytest.mark.parametrize("caching", [True, False])
def test_blocks_run_out_and_the_newest_gives_way(caching: bool) -> None:
    """The reference's replay of the same, to the nanosecond: 256 + 200 tokens each, of 13 blocks."""
    rank = scheduler(num_gpu_blocks=13, enable_prefix_caching=caching)
    old, new = sequence(256, 200, 1), sequence(256, 200, 2)
    end = run(rank, old, new)
    assert end / MS == pytest.approx(8_621.621136 if caching else 9_948.65925, abs=1e-5)
    assert (old.preemptions, new.preemptions) == (0, rank.statistics.preemptions)
    assert rank.statistics.preemptions > 1, "it is tried again in each pass in which the prompt alone would fit"
    assert rank.statistics.tokens == 400, "no token is made twice"
    assert rank.pool.used == 0


def test_or_the_oldest_does() -> None:
    rank = scheduler(num_gpu_blocks=13, preemption_mode="fifo")
    old, new = sequence(256, 200, 1), sequence(256, 200, 2)
    run(rank, old, new)
    assert old.preemptions > 0


def test_a_preempted_prompt_finds_its_blocks_again() -> None:
    rank = scheduler(num_gpu_blocks=13)
    new = sequence(256, 200, 2)
    run(rank, sequence(256, 200, 1), new)
    assert new.cached == 256
    assert rank.hit_rate == 0, "only first admissions count"


def test_what_can_never_fit_is_rejected_and_holds_up_nobody() -> None:
    rank = scheduler(num_gpu_blocks=4)
    huge, small = sequence(257, 1), sequence(10, 1)
    run(rank, huge, small)
    assert (huge.phase, small.phase) == (Phase.REJECTED, Phase.FINISHED)
    assert rank.take_rejected() == [huge]
    assert rank.take_rejected() == []


def test_without_chunks_so_is_a_prompt_above_the_budget() -> None:
    rank = scheduler(max_num_batched_tokens=512, enable_chunked_prefill=False)
    large = sequence(513, 1)
    run(rank, large)
    assert large.phase is Phase.REJECTED


def test_an_answer_that_would_outgrow_all_blocks_is_rejected_at_once() -> None:
    rank = scheduler(num_gpu_blocks=4)
    fits, endless = sequence(100, 156), sequence(100, 157)
    run(rank, fits, endless)
    assert (fits.phase, endless.phase) == (Phase.FINISHED, Phase.REJECTED), "the reference tries the second one forever"


def test_the_watermark_keeps_blocks_free_while_others_run() -> None:
    rank = scheduler(num_gpu_blocks=20, watermark=0.25)
    for _ in range(4):
        rank.submit(sequence(320, 2), 0)
    rank.start(0)
    assert (rank.running, rank.pool.used) == (3, 15)
    alone = scheduler(num_gpu_blocks=20, watermark=0.25)
    alone.submit(sequence(1270, 5), 0)
    alone.start(0)
    assert alone.running == 1, "nothing else runs"


def test_withdrawing_frees_slot_and_blocks_at_once() -> None:
    rank = scheduler(max_num_batched_tokens=256)
    running, filling, waiting = sequence(64, 100), sequence(1000, 5), sequence(10, 5)
    rank.submit(running, 0)
    rank.start(0)
    now = rank.finish().end
    for each in (filling, waiting):
        rank.submit(each, now)
    rank.start(now)
    assert filling.phase is Phase.PREFILLING and rank.pool.used == 6
    rank.withdraw(filling, now)
    assert (rank.pool.used, rank.running, rank.waiting) == (2, 1, 1)
    rank.withdraw(waiting, now)
    rank.withdraw(running, now)
    rank.withdraw(running, now)
    assert (rank.pool.used, rank.running, rank.waiting) == (0, 0, 0)
    assert rank.finish().fresh == []
    assert running.made == 1, "the pass in which it left gave it nothing"
    assert rank.start(now) is None


def test_usage_is_summed_over_time() -> None:
    rank = scheduler(num_gpu_blocks=100)
    end = run(rank, sequence(64, 2))
    statistics = rank.statistics
    assert statistics.busy == end
    assert 1 <= statistics.used_time / statistics.busy <= 2
    assert (statistics.passes, statistics.tokens, statistics.finished, statistics.admitted) == (2, 2, 1, 1)


def test_the_hit_rate_is_that_of_the_last_thousand_requests() -> None:
    rank = scheduler()
    assert rank.hit_rate is None
    now = run(rank, sequence(64, 1, 1))
    for _ in range(1000):
        now = run(rank, sequence(64, 1, 1), now=now)
    assert rank.hit_rate == 1.0
    for _ in range(500):
        now = run(rank, sequence(64, 1), now=now)
    assert rank.hit_rate == 0.5
