"""All that touches SGLang itself: its `Engine`, as of 0.5."""

# pyright: basic, reportMissingImports=false
# sglang belongs to an extra (absent where types are checked).

import inspect
from typing import Any

import msgspec
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs

from stator.errors import ConfigError, EngineError, Overloaded, StatorError

__all__ = ["Facts", "build", "error_of", "facts_of", "generate_names", "server_fields"]


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of itself once it runs. Tokens and requests are per rank."""

    context_length: int
    page_size: int
    token_capacity: int
    max_running_requests: int | None
    max_prefill_tokens: int | None
    defaults: dict[str, Any]


def server_fields() -> frozenset[str]:
    """The arguments that this version's `ServerArgs` takes."""
    return frozenset(inspect.signature(ServerArgs).parameters)


def build(arguments: dict[str, Any]) -> Engine:
    """The engine, running. Blocks, up to minutes. Raises `ConfigError` with what SGLang finds wrong with the arguments."""
    if unknown := sorted(arguments.keys() - server_fields()):
        raise ConfigError(f"SGLang does not take these arguments: {', '.join(unknown)}")
    return Engine(**arguments)


def generate_names(engine: Engine) -> frozenset[str]:
    """The arguments that this version's `async_generate` takes."""
    return frozenset(inspect.signature(engine.async_generate).parameters)


async def facts_of(engine: Engine) -> Facts:
    """Ask the schedulers, as `get_server_info` does outside of an event loop."""
    manager = engine.tokenizer_manager
    first = (await manager.get_internal_state())[0]
    capacity = (first.get("memory_usage") or {}).get("token_capacity") or first.get("max_total_num_tokens") or 0
    defaults_of = getattr(getattr(manager, "model_config", None), "get_default_sampling_params", None)
    return Facts(
        context_length=int(manager.context_len),
        page_size=int(first.get("page_size") or 1),
        token_capacity=int(capacity),
        max_running_requests=first.get("effective_max_running_requests_per_dp") or first.get("max_running_requests"),
        max_prefill_tokens=first.get("max_prefill_tokens"),
        defaults=dict(defaults_of()) if defaults_of is not None else {},
    )


def error_of(error: Exception) -> StatorError:
    """Who must act about what SGLang raised."""
    status = getattr(error, "status_code", None)
    text = str(getattr(error, "detail", "") or error)
    if status == 503:
        return Overloaded(text, phase="accept")
    if status == 400 or isinstance(error, ValueError | TypeError):
        return EngineError(text, kind="InvalidArgument")
    return EngineError(f"{type(error).__name__}: {text}")
