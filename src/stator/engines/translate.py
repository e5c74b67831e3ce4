"""From a request to a sequence: what was asked, checked against what the model can do."""

import math
from collections.abc import Callable

import msgspec

from stator.engines.sequence import Sampling, Sequence
from stator.engines.unsupported import refuse
from stator.errors import EngineError
from stator.llm.request import PreprocessedRequest, SamplingOptions

__all__ = ["ModelLimits", "sequence_for"]


class ModelLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What requests are checked against.

    `defaults` is what the model's generation config wants where a request says nothing.
    """

    vocabulary: int
    """token ids are below this"""
    context_length: int
    """prompt and answer together, in tokens"""
    limited_by: str = "the model's context"
    """what that length is"""
    eos_ids: frozenset[int] = frozenset()
    defaults: Sampling = Sampling()


def sequence_for(request: PreprocessedRequest, limits: ModelLimits, *, random_seed: Callable[[], int]) -> Sequence:
    """A sequence ready to be stepped; `max_tokens` is what is left of the context unless the request asks for less.

    Raises `EngineError` of kind `InvalidArgument` naming what cannot be done. `random_seed` is used if the request has none.
    """
    refuse(request, {"guided decoding": request.sampling_options.guided_decoding is not None})
    prompt, stop = request.token_ids, request.stop_conditions
    _check_prompt(prompt, limits)
    left = limits.context_length - len(prompt)
    eos = limits.eos_ids.union(request.eos_token_ids)
    hidden = frozenset(stop.stop_token_ids_hidden or ())
    return Sequence(
        prompt,
        sampling=_sampling(request, limits.defaults, random_seed),
        max_tokens=left if stop.max_tokens is None else min(max(stop.max_tokens, 0), left),
        min_tokens=max(stop.min_tokens or 0, 0),
        eos_ids=hidden - eos if stop.ignore_eos else hidden | eos,
        stop_ids=frozenset(stop.stop_token_ids or ()) | frozenset(stop.stop_token_ids_visible or ()),
    )


def _check_prompt(prompt: list[int], limits: ModelLimits) -> None:
    if not prompt:
        raise _invalid("token_ids must not be empty")
    if min(prompt) < 0 or max(prompt) >= limits.vocabulary:
        wrong = next(token for token in prompt if not 0 <= token < limits.vocabulary)
        raise _invalid(f"token id {wrong} is outside the model's vocabulary of {limits.vocabulary}")
    if len(prompt) >= limits.context_length:
        raise _invalid(
            f"the prompt has {len(prompt)} tokens; {limits.limited_by} of {limits.context_length} leaves no room for an answer"
        )


def _sampling(request: PreprocessedRequest, defaults: Sampling, random_seed: Callable[[], int]) -> Sampling:
    asked = request.sampling_options
    top_k = _in_range("top_k", asked.top_k, defaults.top_k, least=-1)
    return Sampling(
        temperature=_temperature(asked, defaults),
        top_p=_in_range("top_p", asked.top_p, defaults.top_p, above=0, most=1),
        top_k=max(int(top_k), 0),
        min_p=_in_range("min_p", asked.min_p, defaults.min_p, least=0, most=1),
        repetition_penalty=_in_range("repetition_penalty", asked.repetition_penalty, defaults.repetition_penalty, above=0),
        presence_penalty=_in_range("presence_penalty", asked.presence_penalty, 0.0, least=-2, most=2),
        frequency_penalty=_in_range("frequency_penalty", asked.frequency_penalty, 0.0, least=-2, most=2),
        seed=(random_seed() if asked.seed is None else asked.seed) % 2**63,
        logprobs=None if (count := request.output_options.logprobs) is None else int(_in_range("logprobs", count, 0, least=0)),
    )


def _temperature(asked: SamplingOptions, defaults: Sampling) -> float:
    """As asked; else as the model's config has it, which is usually greedy; but 1 for a request that shapes the sampling in
    other ways."""
    if asked.temperature is None and not defaults.temperature:
        shapes = (asked.seed, asked.top_p, asked.top_k, asked.min_p)
        return 0.0 if all(value is None for value in shapes) else 1.0
    return _in_range("temperature", asked.temperature, defaults.temperature, least=0)


def _in_range(
    name: str,
    value: float | None,
    default: float,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
) -> float:
    """`value` if it is above `above`, at least `least` and at most `most`; `default` if it is None."""
    if value is None:
        return default
    if math.isfinite(value) and value > above and least <= value <= most:
        return value
    bounds = [f"above {above:g}" if above > -math.inf else "", f"at least {least:g}" if least > -math.inf else ""]
    bounds.append(f"at most {most:g}" if most < math.inf else "")
    raise _invalid(f"{name} must be {' and '.join(filter(None, bounds))}, got {value:g}")


def _invalid(message: str) -> EngineError:
    return EngineError(message, kind="InvalidArgument")
