"""Bringing a model of the transformers library into memory."""

# pyright: basic, reportMissingImports=false
# torch and transformers belong to an extra (absent where types are checked) and are largely untyped.

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from stator.engines.causal_lm import CausalLM
from stator.engines.model_source import TEXT_FILES, local_directory
from stator.engines.sequence import Sampling
from stator.engines.step_thread import TokenModel
from stator.engines.translate import ModelLimits
from stator.errors import ConfigError
from stator.llm.card import ModelCard, card_from_directory

__all__ = ["LoadedModel", "load"]

_FILES = (*TEXT_FILES, "*.safetensors")
_UNLIMITED_CONTEXT = 32_768
"""tokens, for models that name no limit"""


class LoadedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model ready to be stepped, and what is known of it. `free` gives its memory back; blocks."""

    stepped: TokenModel
    card: ModelCard
    limits: ModelLimits
    free: Callable[[], None]


def load(
    source: str,
    *,
    device: str,
    dtype: str,
    context_length: int | None,
    max_rows: int,
    threads: int | None,
    report: Callable[[str], None],
) -> LoadedModel:
    """Read a model directory, or a model by its id on the hub (fetched unless it is in the local cache). Blocks, up to minutes.

    Only safetensors are read (no pickles), and no code that comes with the model is run. Raises `ConfigError` naming the
    setting at fault, or what the library said.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch_device = _device(device)
    torch_dtype = _dtype(dtype, torch_device)
    directory = local_directory(source, files=_FILES, report=report)
    card = card_from_directory(directory, name=source)
    report(f"loading {source}")
    try:
        with _quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch_dtype, use_safetensors=True)
        model = model.to(torch_device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"model {source!r} cannot be loaded: {error}") from error
    report(f"loaded {source} on {torch_device}; trying it")
    stepped = CausalLM(model, max_rows=max_rows)
    limits = _limits(model, stepped.vocabulary, context_length, card)
    stepped.check()
    return LoadedModel(
        stepped=stepped,
        card=msgspec.structs.replace(card, source_path=source),
        limits=limits,
        free=stepped.free,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used: {error}") from error
    return device


def _dtype(name: str, device: torch.device) -> Any:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: Any = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ConfigError(f"dtype {name!r} is no floating point type of torch; try float32, bfloat16 or float16")
    return dtype


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars on the terminal: `report` is how progress is told."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _limits(model: Any, vocabulary: int, context_length: int | None, card: ModelCard) -> ModelLimits:
    longest = card.context_length or None
    if context_length is not None and longest is not None and context_length > longest:
        raise ConfigError(f"context_length {context_length} is more than the model's {longest}")
    generation = model.generation_config
    eos = generation.eos_token_id
    return ModelLimits(
        vocabulary=vocabulary,
        context_length=context_length or longest or _UNLIMITED_CONTEXT,
        eos_ids=frozenset([eos] if isinstance(eos, int) else eos or ()),
        defaults=_defaults(generation),
    )


def _defaults(generation: Any) -> Sampling:
    """What the generation config wants; its sampling values count only where it wants sampling."""
    penalty = generation.repetition_penalty or 1.0
    if not generation.do_sample:
        return Sampling(repetition_penalty=penalty)
    return Sampling(
        temperature=1.0 if generation.temperature is None else generation.temperature,
        top_p=generation.top_p or 1.0,
        top_k=generation.top_k or 0,
        min_p=generation.min_p or 0.0,
        repetition_penalty=penalty,
    )
