"""What of a request concerns every foreign engine alike."""

from collections.abc import Mapping
from typing import Any

from stator.engines.unsupported import refuse
from stator.llm.request import PreprocessedRequest

__all__ = ["chosen_fields", "ending_ids", "refuse_unsupported"]


def refuse_unsupported(request: PreprocessedRequest) -> None:
    """Raises `EngineError` of kind `InvalidArgument` naming what the adapters do not pass on."""
    refuse(request, {"LoRA adapters": request.routing and request.routing.lora_name})


def ending_ids(request: PreprocessedRequest) -> tuple[frozenset[int], frozenset[int]]:
    """Tokens that end the answer as `eos`, and those that end it as `stop`."""
    stop = request.stop_conditions
    eos, hidden = frozenset(request.eos_token_ids), frozenset(stop.stop_token_ids_hidden or ())
    return (
        hidden - eos if stop.ignore_eos else hidden | eos,
        frozenset(stop.stop_token_ids or ()) | frozenset(stop.stop_token_ids_visible or ()),
    )


def chosen_fields(request: PreprocessedRequest, defaults: Mapping[str, Any], **own: object) -> dict[str, Any]:
    """Sampling by the names that the libraries share, and by the library's `own`; None: the request leaves it open. That is as in
    `defaults`, the model's own generation config, or left to the library.
    """
    sampling = request.sampling_options
    asked = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        **own,
    }
    fields = {name: value for name, value in defaults.items() if name in asked}
    return fields | {name: value for name, value in asked.items() if value is not None}
