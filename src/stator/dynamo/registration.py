"""Puts models into discovery, where frontends find them."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from blake3 import blake3

from stator.dynamo.choices import ModelInput, WorkerType
from stator.dynamo.endpoint import Endpoint
from stator.dynamo.errors import InvalidType, InvalidValue, NotThere
from stator.dynamo.model import ModelRuntimeConfig, ModelType
from stator.llm.card import ModelCard, card_from_directory, card_to_json
from stator.llm.card import WorkerType as CardWorkerType
from stator.protocol.ids import slug
from stator.protocol.records import ModelRecord
from stator.runtime import Runtime

__all__ = ["fetch_model", "lora_name_to_id", "register_model", "unregister_model"]

_NO_LONGER_THAN = 2**31 - 1


async def register_model(
    model_input: ModelInput,
    model_type: ModelType,
    endpoint: Endpoint,
    model_path: str,
    model_name: str | None = None,
    kv_cache_block_size: int | None = None,
    router_config: Any = None,
    runtime_config: ModelRuntimeConfig | None = None,
    user_data: dict[str, Any] | None = None,
    custom_template_path: str | None = None,
    media_decoder: Any = None,
    media_fetcher: Any = None,
    lora_name: str | None = None,
    base_model_path: str | None = None,
    worker_type: WorkerType | None = None,
    needs: Sequence[Sequence[WorkerType]] | None = None,
    self_host_metadata: bool | None = None,
    *,
    tensor_model_config: dict[str, Any] | None = None,
    ignore_weights: bool = False,
    max_gpu_lora_count: int | None = None,
) -> None:
    """Say that `endpoint` serves the model at `model_path`, a directory. A second call replaces the first card.

    Models are not downloaded, so `ignore_weights` and `self_host_metadata` change nothing. Raises `ValueError` for arguments that
    contradict each other, `UsageError` for a path that is no model directory, `NotThere` for what only the reference's frontend
    understands.
    """
    _check(model_input, model_type, worker_type, lora_name, base_model_path)
    for what, given in (("router_config", router_config), ("media_decoder", media_decoder), ("media_fetcher", media_fetcher)):
        if given is not None:
            raise NotThere(f"{what} of register_model comes with {_BRINGS[what]}")
    runtime = await endpoint.membership.runtime()
    limits = (runtime_config or ModelRuntimeConfig()).for_card()
    if max_gpu_lora_count is not None and lora_name is None:
        limits = msgspec.structs.replace(limits, max_gpu_lora_count=max_gpu_lora_count)
    shape: dict[str, Any] = {
        "model_input": model_input.name,
        "model_type": " | ".join(model_type.flags),
        "worker_type": _card_type(worker_type),
        "needs": [[_card_type(one) for one in alternative] for alternative in needs or ()],
        "user_data": user_data,
        "runtime_config": limits,
        "kv_cache_block_size": kv_cache_block_size or 16,
        "tensor_model_config": tensor_model_config,
    }
    name = lora_name or model_name or model_path
    if model_input is ModelInput.Tensor:
        card = ModelCard(display_name=name, **shape)
    else:
        source = base_model_path or model_path
        found = await asyncio.to_thread(card_from_directory, source, name=name, chat_template=custom_template_path)
        card = msgspec.structs.replace(found, **shape)
    if lora_name is not None:
        card = msgspec.structs.replace(card, lora={"name": lora_name, "max_gpu_lora_count": max_gpu_lora_count})
    record = _record(runtime, endpoint, card_to_json(card), lora_name)
    await runtime.discovery.unregister(record.key)
    await runtime.publish(record)


async def unregister_model(endpoint: Endpoint, lora_name: str | None = None) -> None:
    """Take the card of `endpoint`, or that of one of its adapters, out of discovery. Idempotent, which the reference's is not."""
    runtime = await endpoint.membership.runtime()
    await runtime.discovery.unregister(_record(runtime, endpoint, {}, lora_name).key)


async def fetch_model(remote_name: str, ignore_weights: bool = False) -> str:
    """The directory of a model that is there already. Raises `NotThere` for any other: Stator does not download."""
    if await asyncio.to_thread(Path(remote_name).is_dir):
        return remote_name
    raise NotThere(
        f"{remote_name!r} is no directory, and Stator does not download models; get it first, for example by `hf download {remote_name}`"
    )


def lora_name_to_id(lora_name: str) -> int:
    """The number by which engines know an adapter: 31 bits of the name's blake3."""
    return int.from_bytes(blake3(lora_name.encode()).digest()[:8], "big") & _NO_LONGER_THAN


_BRINGS = {
    "router_config": "KV routing",
    "media_decoder": "multimodal requests, which are not planned yet",
    "media_fetcher": "multimodal requests, which are not planned yet",
}


def _check(model_input: object, model_type: object, worker_type: object, lora_name: object, base_model_path: object) -> None:
    if not isinstance(model_input, ModelInput):
        raise InvalidType(f"model_input must be a ModelInput, not {type(model_input).__name__}")
    if not isinstance(model_type, ModelType):
        raise InvalidType(f"model_type must be a ModelType, not {type(model_type).__name__}")
    if worker_type is None:
        raise InvalidValue(
            "register_model: `worker_type` is required. Pass one of WorkerType.Prefill / Decode / Encode / Aggregated."
        )
    if not isinstance(worker_type, WorkerType):
        raise InvalidType(f"worker_type must be a WorkerType, not {type(worker_type).__name__}")
    if (lora_name is None) != (base_model_path is None):
        raise InvalidValue("lora_name and base_model_path must both be provided together, or neither")


def _card_type(worker_type: WorkerType | None) -> CardWorkerType | None:
    return None if worker_type is None else CardWorkerType(str(worker_type))


def _record(runtime: Runtime, endpoint: Endpoint, card: dict[str, Any], lora_name: str | None) -> ModelRecord:
    return ModelRecord(
        namespace=endpoint.id.namespace,
        component=endpoint.id.component,
        endpoint=endpoint.id.name,
        instance_id=runtime.instance_id,
        card_json=card,
        model_suffix=msgspec.UNSET if lora_name is None else slug(lora_name),
    )
