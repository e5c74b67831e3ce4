"""Block hashes: the numbers a peer computes, for the same tokens."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from stator.errors import UsageError
from stator.kv.hashing import HASH_SEED, hash_seed, local_hashes, sequence_hashes

CASES: list[dict[str, Any]] = json.loads((Path(__file__).parent / "recorded_block_hashes.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_the_numbers_are_those_of_a_peer(case: dict[str, Any]) -> None:
    media = case["mm"] and [info and [one["mm_hash"] for one in info["mm_objects"]] for info in case["mm"]]
    assert hash_seed(case["lora_name"]) == case["seed"]
    local = local_hashes(
        case["tokens"],
        block_size=case["block_size"],
        lora_name=case["lora_name"],
        mm_hashes=media,
        eagle=case["eagle"],
    )
    assert local == case["local"]
    assert sequence_hashes(local) == case["sequence"]


def test_there_are_cases_of_every_kind() -> None:
    assert len(CASES) == 21
    assert {case["eagle"] for case in CASES} == {True, False}
    assert any(case["mm"] for case in CASES)
    assert any(case["lora_name"] for case in CASES)


def test_a_chain_may_be_continued() -> None:
    tokens = [random.Random(1).randrange(2**32) for _ in range(40)]
    local = local_hashes(tokens, block_size=4)
    chain = sequence_hashes(local)
    assert chain == sequence_hashes(local[:3]) + sequence_hashes(local[3:], parent=chain[2])
    assert len(set(chain)) == 10
    assert sequence_hashes([]) == []


def test_a_block_is_hashed_by_itself() -> None:
    """Where a block stands changes its sequence hash, not its local one."""
    tokens = list(range(16))
    whole = local_hashes(tokens, block_size=4)
    assert whole == [one for start in range(0, 16, 4) for one in local_hashes(tokens[start : start + 4], block_size=4)]


def test_media_of_blocks_that_are_not_full_are_ignored() -> None:
    plain = local_hashes([1, 2, 3, 4, 5], block_size=4)
    assert local_hashes([1, 2, 3, 4, 5], block_size=4, mm_hashes=[None, [7]]) == plain
    assert local_hashes([1, 2, 3, 4, 5], block_size=4, mm_hashes=[[7]]) != plain
    assert local_hashes([1, 2, 3, 4] * 2, block_size=4, mm_hashes=[(), None, [3]]) == plain * 2


def test_any_sequence_of_whole_numbers_will_do() -> None:
    assert local_hashes(range(8), block_size=4) == local_hashes(tuple(range(8)), block_size=4)
    assert hash_seed(None) == hash_seed("") == HASH_SEED


@pytest.mark.parametrize("token", [-1, 2**32, 1.5, "1", None])
def test_what_is_no_token_is_refused(token: Any) -> None:
    with pytest.raises(UsageError, match="token ids must be whole numbers"):
        local_hashes([1, 2, 3, token], block_size=4)


def test_other_bad_arguments_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 1 token"):
        local_hashes([1], block_size=0)
    with pytest.raises(UsageError, match="media hashes"):
        local_hashes([1], block_size=1, mm_hashes=[[-1]])
