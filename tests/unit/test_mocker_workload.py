"""What simulations are given to do."""

from pathlib import Path
from statistics import fmean

import pytest

from stator.errors import UsageError
from stator.mocker.workload import Arrival, block_hashes, mooncake_trace, read_mooncake_trace, synthetic_load


def hashes(content: tuple[tuple[int, int], ...], tokens: int, *, number: int = 0, block_size: int = 4) -> list[int]:
    arrival = Arrival(time=0, prompt_tokens=tokens, output_tokens=1, content=content)
    return block_hashes(arrival, number=number, block_size=block_size)


def test_equal_beginnings_have_equal_hashes() -> None:
    one, two = hashes(((1, 8), (2, 8)), 16), hashes(((1, 8), (3, 8)), 16)
    assert one[:2] == two[:2]
    assert set(one[2:]).isdisjoint(two[2:])


def test_only_full_blocks_have_hashes() -> None:
    assert [len(hashes(((1, 100),), tokens)) for tokens in (3, 4, 7, 8)] == [0, 1, 1, 2]


def test_a_hash_names_all_that_is_before() -> None:
    assert hashes(((1, 4), (2, 4)), 8)[1] != hashes(((3, 4), (2, 4)), 8)[1]


def test_repeated_content_has_other_hashes() -> None:
    assert len(set(hashes(((1, 4),) * 50, 200))) == 50
    assert len(set(hashes(((1, 200),), 200))) == 50


def test_parts_may_meet_within_a_block() -> None:
    one, two, three = hashes(((1, 6), (2, 6)), 12), hashes(((1, 6), (3, 6)), 12), hashes(((1, 7), (2, 5)), 12)
    assert one[0] == two[0] == three[0]
    assert len({one[1], two[1], three[1]}) == 3
    assert len(set(hashes(tuple((part, 1) for part in range(12)), 12))) == 3


def test_what_is_not_given_is_like_no_other() -> None:
    assert hashes((), 8, number=1) != hashes((), 8, number=2)
    partly = [hashes(((1, 4),), 12, number=number) for number in (1, 2)]
    assert partly[0][0] == partly[1][0]
    assert partly[0][1] != partly[1][1]


def test_synthetic_load_is_what_was_asked_for() -> None:
    load = synthetic_load(
        requests=4000, rate=10, prompt_tokens=1000, output_tokens=100, spread=0.5, shared_prefix_ratio=0.25, num_prefix_groups=4
    )
    assert load[0].time == 0
    assert load[-1].time == pytest.approx(400, rel=0.05)
    assert fmean(each.prompt_tokens for each in load) == pytest.approx(1000, rel=0.05)
    assert min(each.output_tokens for each in load) >= 50 and max(each.output_tokens for each in load) <= 150
    assert len({each.content[0][0] for each in load}) == 4
    assert all(each.content[0][1] == each.prompt_tokens // 4 for each in load)
    assert len({each.content[1][0] for each in load}) == 4000


def test_intervals_may_be_equal() -> None:
    load = synthetic_load(requests=3, rate=4, prompt_tokens=10, output_tokens=5, poisson=False)
    assert [each.time for each in load] == [0, 0.25, 0.5]
    assert {(each.prompt_tokens, each.output_tokens) for each in load} == {(10, 5)}


def test_the_seed_decides() -> None:
    def load(seed: int) -> list[Arrival]:
        return synthetic_load(requests=10, rate=1, prompt_tokens=100, output_tokens=10, spread=0.3, seed=seed)

    assert load(1) == load(1) != load(2)


@pytest.mark.parametrize("wrong", [{"rate": 0}, {"prompt_tokens": 0}, {"spread": 1.5}, {"shared_prefix_ratio": -1}])
def test_senseless_load_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        synthetic_load(**{"requests": 1, "rate": 1, "prompt_tokens": 1, "output_tokens": 1, **wrong})  # pyright: ignore[reportArgumentType]


ROW = '{"timestamp":1500,"input_length":600,"output_length":20,"hash_ids":[7,8],"session_id":"a","delay":250}'


def test_rows_of_a_trace(tmp_path: Path) -> None:
    expected = [Arrival(time=1.5, prompt_tokens=600, output_tokens=20, content=((7, 512), (8, 512)), session="a", delay=0.25)]
    assert mooncake_trace([ROW, "", "  \n"]) == expected
    path = tmp_path / "trace.jsonl"
    path.write_text(ROW + "\n", "utf-8")
    assert read_mooncake_trace(path) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "line 2 cannot be read"),
        ('{"timestamp":"soon"}', "line 2 cannot be read"),
        ('{"timestamp":0,"input_length":0,"output_length":1,"hash_ids":[]}', "line 2: lengths"),
        ('{"timestamp":0,"input_length":513,"output_length":1,"hash_ids":[1]}', "hash_ids must cover"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(line: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mooncake_trace([ROW, line])
