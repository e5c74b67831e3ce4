"""From requests to sequences: defaults, limits, and what is refused."""

from typing import Any

import pytest

from stator.engines.sequence import Sampling, Sequence
from stator.engines.translate import ModelLimits, sequence_for
from stator.errors import EngineError
from stator.llm.request import OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions

LIMITS = ModelLimits(vocabulary=100, context_length=20, eos_ids=frozenset({2}))


def translate(limits: ModelLimits = LIMITS, *, sampling: dict[str, Any] | None = None, **fields: Any) -> Sequence:
    stop = {name: fields.pop(name) for name in tuple(fields) if name in StopConditions.__struct_fields__}
    request = PreprocessedRequest(
        **({"token_ids": [5, 6]} | fields),
        stop_conditions=StopConditions(**stop),
        sampling_options=SamplingOptions(**(sampling or {})),
    )
    return sequence_for(request, limits, random_seed=lambda: 4711)


@pytest.mark.parametrize(("asked", "given"), [(None, 18), (5, 5), (18, 18), (19, 18), (0, 0)])
def test_max_tokens_is_bounded_by_the_context(asked: int | None, given: int) -> None:
    assert translate(max_tokens=asked).max_tokens == given


def test_every_source_of_ends_counts() -> None:
    one = translate(eos_token_ids=[3], stop_token_ids_hidden=[4], stop_token_ids=[5], stop_token_ids_visible=[6])
    assert one.eos_ids == {2, 3, 4}
    assert one.stop_ids == {5, 6}


def test_ignore_eos_leaves_the_other_ends() -> None:
    one = translate(eos_token_ids=[3], stop_token_ids_hidden=[2, 3, 4], stop_token_ids=[5], ignore_eos=True)
    assert one.eos_ids == {4}
    assert one.stop_ids == {5}


@pytest.mark.parametrize(
    ("asked", "temperature"),
    [({}, 0.0), ({"temperature": 0.0, "seed": 1}, 0.0), ({"temperature": 0.3}, 0.3), ({"seed": 1}, 1.0), ({"top_p": 0.5}, 1.0)],
)
def test_temperature_without_the_models_wish(asked: dict[str, Any], temperature: float) -> None:
    assert translate(sampling=asked).sampling.temperature == temperature


def test_the_models_wishes_hold_where_the_request_says_nothing() -> None:
    wishes = Sampling(temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.1)
    limits = ModelLimits(vocabulary=100, context_length=20, defaults=wishes)
    one = translate(limits).sampling
    assert (one.temperature, one.top_p, one.top_k, one.repetition_penalty) == (0.6, 0.9, 20, 1.1)
    two = translate(limits, sampling={"temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}).sampling
    assert (two.temperature, two.top_p, two.top_k, two.repetition_penalty) == (0.0, 1.0, 0, 1.0)


@pytest.mark.parametrize(("asked", "seed"), [(None, 4711), (7, 7), (-1, 2**63 - 1), (2**64, 0)])
def test_every_seed_is_one_the_generator_takes(asked: int | None, seed: int) -> None:
    assert translate(sampling={"seed": asked}).sampling.seed == seed


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"token_ids": []}, "token_ids must not be empty"),
        ({"token_ids": [1, 100]}, "token id 100 is outside the model's vocabulary of 100"),
        ({"token_ids": [1, -1]}, "token id -1"),
        ({"token_ids": [1] * 20}, "the prompt has 20 tokens; the model's context of 20"),
        ({"sampling": {"temperature": float("inf")}}, "temperature must be at least 0, got inf"),
        ({"sampling": {"top_p": 1.5}}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"sampling": {"top_k": -2}}, "top_k must be at least -1"),
        ({"sampling": {"min_p": -0.1}}, "min_p must be at least 0 and at most 1"),
        ({"sampling": {"repetition_penalty": 0.0}}, "repetition_penalty must be above 0"),
        ({"sampling": {"presence_penalty": 3.0}}, "presence_penalty must be at least -2 and at most 2"),
        ({"sampling": {"best_of": 2}}, "best_of"),
        ({"output_options": OutputOptions(logprobs=-1)}, "logprobs must be at least 0"),
        ({"output_options": OutputOptions(prompt_logprobs=1)}, "prompt log probabilities"),
        ({"prompt_embeds": "AAAA"}, "prompt embeddings"),
        ({"multi_modal_data": {"image_url": []}}, "multimodal input"),
    ],
)
def test_what_cannot_be_done_is_named(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EngineError, match=complaint) as caught:
        translate(**fields)
    assert caught.value.kind == "InvalidArgument"
