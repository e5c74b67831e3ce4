"""Families of models, each with its own kind of cache and positions: stepped together, the tokens are those of `generate`."""

import random
from typing import Any

import pytest

from stator.engines.sequence import Sampling, Sequence

torch = pytest.importorskip("torch", reason="needs the extra 'transformers'")
pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]
torch.set_num_threads(1)  # for models this small, threads that wait for each other only take time from other tests

COUNT = 16
LLAMA_LIKE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": (LLAMA_LIKE, True),
    "gpt2": ({"vocab_size": 300, "n_embd": 64, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 1}, True),
    "opt": (SMALL | {"ffn_dim": 128, "num_attention_heads": 4, "word_embed_proj_dim": 64}, True),
    "bloom": ({"vocab_size": 300, "hidden_size": 64, "n_layer": 2, "n_head": 4}, True),
    "mistral": (LLAMA_LIKE | {"sliding_window": 8}, False),
    "gemma3_text": (LLAMA_LIKE | {"head_dim": 16, "sliding_window": 8}, False),
    "mamba": (SMALL | {"state_size": 8}, False),
    "rwkv": (SMALL | {"attention_hidden_size": 64}, False),
}


def build(family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family][0])).float().eval()
    model.generation_config.eos_token_id = None
    return model


def generate(model: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=COUNT, do_sample=False, pad_token_id=0)
    return output[0].tolist()


def read(stepped: Any, sequence: Sequence, part: int = 1000) -> None:
    """Read the prompt, in parts, and take the first token."""
    choice = None
    while choice is None:
        choice = stepped.prefill(sequence, part)
    sequence.append(choice.token_id)


def step_together(stepped: Any, sequences: list[Sequence], rng: random.Random, *, part: int = 1000, evict: float = 0.0) -> None:
    """Let the sequences join at random moments, be evicted with some probability, and leave when they are done."""
    waiting, reading, running = list(sequences), list[Sequence](), list[Sequence]()
    while waiting or reading or running:
        if waiting and (not running or rng.random() < 0.4):
            reading.append(waiting.pop(0))
        for held in (reading, running):
            if held and rng.random() < evict:
                victim = held.pop(rng.randrange(len(held)))
                stepped.evict(victim)
                waiting.insert(0, victim)
        if reading and (choice := stepped.prefill(reading[0], part)) is not None:
            running.append(reading.pop(0))
            if running[-1].append(choice.token_id) is not None:
                stepped.release(running.pop())
        for sequence, choice in stepped.decode():
            assert not isinstance(choice, Exception)
            if sequence.append(choice.token_id) is not None:
                running.remove(sequence)
                stepped.release(sequence)


def some_sequences(rng: random.Random) -> list[Sequence]:
    prompts = [[rng.randrange(4, 300) for _ in range(rng.randrange(1, 40))] for _ in range(8)]
    return [Sequence(prompt, sampling=Sampling(), max_tokens=COUNT) for prompt in prompts]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family: str) -> None:
    from stator.engines.causal_lm import CausalLM

    model, rng = build(family), random.Random(family)
    sequences = some_sequences(rng)
    expected = [generate(model, sequence.tokens) for sequence in sequences]
    step_together(CausalLM(model, max_rows=4), sequences, rng)
    assert [sequence.tokens for sequence in sequences] == expected


@pytest.mark.parametrize("part", [3, 13])
@pytest.mark.parametrize("family", FAMILIES)
def test_reading_in_parts_and_evicting_change_nothing(family: str, part: int) -> None:
    from stator.engines.causal_lm import CausalLM

    model, rng = build(family), random.Random(f"{family} {part}")
    sequences = some_sequences(rng)
    expected = [generate(model, sequence.tokens) for sequence in sequences]
    stepped = CausalLM(model, max_rows=4)
    step_together(stepped, sequences, rng, part=part, evict=0.05)
    assert [sequence.tokens for sequence in sequences] == expected
    assert not stepped._batches  # pyright: ignore[reportPrivateUsage]  # what is held does not show otherwise
    assert not stepped._partial  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_is_read_in_parts_where_the_cache_allows_it(family: str) -> None:
    from stator.engines.causal_lm import CausalLM

    stepped = CausalLM(build(family), max_rows=4)
    sequence = Sequence([5] * 20, sampling=Sampling(), max_tokens=COUNT)
    choices = [stepped.prefill(sequence, 8)]
    while choices[-1] is None:
        choices.append(stepped.prefill(sequence, 8))
    assert len(choices) == (1 if family in ("mamba", "rwkv") else 3)
    assert sequence.read == 20


def test_a_seeded_choice_survives_an_eviction() -> None:
    from stator.engines.causal_lm import CausalLM

    answers: list[list[int]] = []
    model = build("llama")
    for evictions in (0.0, 0.4):
        sequences = [Sequence([7] * 9, sampling=Sampling(temperature=1.0, seed=3), max_tokens=COUNT) for _ in range(2)]
        step_together(CausalLM(model, max_rows=4), sequences, random.Random(5), evict=evictions)
        answers += [sequence.tokens for sequence in sequences]
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_checking_the_model_disturbs_nobody(family: str) -> None:
    from stator.engines.causal_lm import CausalLM

    model = build(family)
    stepped = CausalLM(model, max_rows=4)
    sequence = Sequence([5, 6, 7], sampling=Sampling(), max_tokens=COUNT)
    expected = generate(model, sequence.tokens)
    read(stepped, sequence)
    while True:
        stepped.check()
        [(_, choice)] = stepped.decode()
        assert not isinstance(choice, Exception)
        if sequence.append(choice.token_id) is not None:
            break
    assert sequence.tokens == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_sequences_share_a_pass_where_the_cache_allows_it(family: str) -> None:
    from stator.engines.causal_lm import CausalLM

    stepped = CausalLM(build(family), max_rows=4)
    for length in (3, 5, 7):
        read(stepped, Sequence([5] * length, sampling=Sampling(), max_tokens=COUNT))
    assert len(stepped._batches) == (1 if FAMILIES[family][1] else 3)  # pyright: ignore[reportPrivateUsage]  # the pass itself does not show


def test_padding_is_bounded() -> None:
    """Short sequences do not join a long one when padding would outgrow what is stored."""
    from stator.engines.causal_lm import CausalLM

    stepped = CausalLM(build("llama"), max_rows=8)
    for length in (400, 2, 3, 390, 4, 5, 6):
        read(stepped, Sequence([5] * length, sampling=Sampling(), max_tokens=COUNT))
    batches = [sorted(batch.stored) for batch in stepped._batches]  # pyright: ignore[reportPrivateUsage]
    assert len(batches) == 2
    for stored in batches:
        assert max(stored) * len(stored) <= 2 * sum(stored) + 64 * len(stored)


def test_a_sequence_that_leaves_takes_its_padding_with_it() -> None:
    from stator.engines.causal_lm import CausalLM

    stepped = CausalLM(build("llama"), max_rows=4)
    short, long = (Sequence([5] * length, sampling=Sampling(), max_tokens=COUNT) for length in (10, 60))
    read(stepped, short)
    read(stepped, long)
    [batch] = stepped._batches  # pyright: ignore[reportPrivateUsage]
    assert batch.cache.layers[0].keys.shape[:3:2] == (2, 60)
    stepped.release(long)
    assert batch.cache.layers[0].keys.shape[:3:2] == (1, 10)
    stepped.release(short)
    assert not stepped._batches  # pyright: ignore[reportPrivateUsage]


def test_a_choice_that_fails_ends_its_own_sequence() -> None:
    from stator.engines.causal_lm import CausalLM

    stepped = CausalLM(build("llama"), max_rows=4)
    good, bad = (Sequence([5] * 4, sampling=Sampling(temperature=t), max_tokens=COUNT) for t in (0.0, 1.0))
    for sequence in (good, bad):
        read(stepped, sequence)

    def fail(*_: Any) -> Any:
        raise RuntimeError("probabilities are not finite")

    bad.state = type("Failing", (), {"plain": False, "choose": fail})()
    outcome = dict(stepped.decode())
    assert isinstance(outcome[bad], RuntimeError)
    assert not isinstance(outcome[good], Exception)
