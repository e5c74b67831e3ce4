"""Tokens and hashes of simulated answers."""

import pytest

from stator.errors import EngineError
from stator.kv.hashing import local_hashes, sequence_hashes
from stator.mocker.answer import LETTERS, REFERENCE, Answer

PROMPT = list(range(1, 11))


def answer(
    prompt: list[int] = PROMPT,
    *,
    seed: int = 0,
    request_seed: int | None = None,
    lora: str | None = None,
    reference: bool = True,
) -> Answer:
    return Answer(
        prompt,
        max_tokens=1000,
        block_size=4,
        prefix_caching=True,
        vocabulary=REFERENCE if reference else LETTERS,
        engine_seed=seed,
        request_seed=request_seed,
        lora_name=lora,
    )


def test_tokens_are_those_of_the_reference() -> None:
    tokens = answer().read(0, 20_000)
    assert min(tokens) == 1000 and max(tokens) == 1999
    assert sum(tokens) / len(tokens) == pytest.approx(1499.5, abs=10)


def test_letters_can_be_read() -> None:
    text = bytes(answer(reference=False).read(0, 200)).decode()
    assert all(letter.islower() or letter == " " for letter in text)
    assert " " in text


def test_the_same_request_has_the_same_answer_however_it_is_read() -> None:
    whole = answer().read(0, 100)
    pieces = answer()
    assert [pieces.read(place, place + 1)[0] for place in range(100)] == whole
    assert answer().read(40, 60) == whole[40:60]


def test_prompt_and_both_seeds_decide() -> None:
    others = [answer([*PROMPT, 11]), answer(seed=1), answer(request_seed=0), answer(request_seed=1), answer()]
    answers = [tuple(other.read(0, 50)) for other in others]
    assert len(set(answers)) == 4, "no seed and seed 0 are the same"
    assert answers[4] == answers[2]


def test_seeds_may_be_any_number() -> None:
    assert answer(request_seed=-1).read(0, 5) == answer(request_seed=2**64 - 1).read(0, 5)


def test_blocks_are_hashed_as_everywhere() -> None:
    one = answer()
    tokens = PROMPT + one.read(0, 6)
    for index in (2, 3):
        assert one.hash_at(index) == sequence_hashes(local_hashes(tokens, block_size=4))[index]
    assert one.hashes == sequence_hashes(local_hashes(tokens, block_size=4))
    assert one.block_tokens(0, 4) == tokens
    assert one.block_tokens(1, 1) == tokens[4:8]
    assert one.block_tokens(3, 1) == tokens[12:16]


def test_a_lora_has_blocks_of_its_own() -> None:
    assert set(answer(lora="x").hashes).isdisjoint(answer().hashes)


@pytest.mark.parametrize("wrong", [[-1], [2**32]])
def test_prompts_of_something_else_are_refused(wrong: list[int]) -> None:
    with pytest.raises(EngineError, match="token_ids") as raised:
        answer(wrong)
    assert raised.value.kind == "InvalidArgument"
