"""All that touches vLLM itself: its V1 engine, as of 0.11 to 0.33."""

# pyright: basic, reportMissingImports=false
# vllm belongs to an extra (absent where types are checked).

from collections.abc import Callable
from typing import Any

from vllm.config import KVEventsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError
from vllm.v1.metrics.loggers import StatLoggerBase

from stator.engines.vllm_translate import guided_fields, sampling_fields
from stator.errors import ConfigError, EngineError, Overloaded, StatorError
from stator.llm.request import PreprocessedRequest

try:
    from vllm.exceptions import VLLMClientError
except ImportError:  # older ones raise ValueError
    VLLMClientError = ValueError

__all__ = ["build", "error_of", "sampling_params"]

OnStats = Callable[[int, Any], None]
"""a rank, and its `SchedulerStats`"""


def build(arguments: dict[str, Any], *, kv_endpoint: str | None, on_stats: OnStats) -> AsyncLLM:
    """The engine, running. Blocks, up to minutes; to be called with a running event loop, the one it will be used on.

    With a `kv_endpoint` (`tcp://host:port`) rank r connects to port + r and publishes what its cache holds. Raises `ConfigError`
    with what vLLM finds wrong with the arguments; what happens while it loads is raised as it is.
    """
    try:
        engine_arguments = AsyncEngineArgs(**arguments)
        if kv_endpoint is not None and engine_arguments.kv_events_config is None:
            engine_arguments.kv_events_config = KVEventsConfig(
                enable_kv_cache_events=True, publisher="zmq", endpoint=kv_endpoint, topic=""
            )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM does not take these arguments: {' '.join(str(error).split())}") from error
    return AsyncLLM.from_engine_args(engine_arguments, stat_loggers=[_stat_loggers(on_stats)])


def sampling_params(request: PreprocessedRequest, defaults: dict[str, Any]) -> SamplingParams:
    """Raises what vLLM finds wrong with them."""
    fields = sampling_fields(request, defaults)
    known = getattr(SamplingParams, "__struct_fields__", fields)
    if unknown := [name for name in fields if name not in known]:
        raise EngineError(f"this version of vLLM does not know {', '.join(unknown)}", kind="InvalidArgument")
    if request.sampling_options.guided_decoding is not None:
        fields["structured_outputs"] = StructuredOutputsParams(**guided_fields(request.sampling_options.guided_decoding))
    return SamplingParams(**fields, detokenize=False, output_kind=RequestOutputKind.DELTA)


def error_of(error: Exception) -> StatorError:
    """Who must act about what vLLM raised."""
    cause = error.__cause__
    if isinstance(error, EngineGenerateError) and isinstance(cause, Exception):
        return error_of(cause)
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, EngineDeadError):
        return EngineError(text, kind="EngineShutdown")
    status = getattr(error, "http_status", getattr(error, "status_code", None))
    if status == 503:  # its queue is full, or it is paused
        return Overloaded(text, phase="accept")
    if isinstance(error, VLLMClientError | ValueError | TypeError):
        return EngineError(str(error), kind="InvalidArgument")
    return EngineError(text)


def _stat_loggers(on_stats: OnStats) -> Callable[[Any, int], StatLoggerBase]:
    """One logger per rank: `(vllm_config, engine_index)`."""

    class Logger(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._rank = engine_index

        def record(self, scheduler_stats: Any, iteration_stats: Any = None, *rest: Any, **more: Any) -> None:
            if scheduler_stats is not None:
                on_stats(self._rank, scheduler_stats)

        def log_engine_initialized(self) -> None:
            pass

    return Logger
