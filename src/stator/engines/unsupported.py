"""What of a request no engine here does."""

from collections.abc import Mapping

from stator.errors import EngineError
from stator.llm.request import PreprocessedRequest

__all__ = ["refuse"]


def refuse(request: PreprocessedRequest, more: Mapping[str, object]) -> None:
    """Raises `EngineError` of kind `InvalidArgument` naming what is asked for and not done; `more`: what this engine does not do,
    and whether it is asked for.
    """
    sampling = request.sampling_options
    asked = {
        **more,
        "beam search": sampling.use_beam_search,
        "best_of": (sampling.best_of or 1) > 1,
        "more than one choice per call": (sampling.n or 1) > 1,
        "prompt log probabilities": request.output_options.prompt_logprobs is not None,
        "prompt embeddings": request.prompt_embeds,
        "multimodal input": request.multi_modal_data,
    }
    if refused := [name for name, wanted in asked.items() if wanted]:
        raise EngineError(f"this engine does not support {', '.join(refused)}", kind="InvalidArgument")
