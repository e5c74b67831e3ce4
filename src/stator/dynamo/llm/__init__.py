"""`dynamo.llm`: models in discovery. What Stator does not have can be imported and raises `NotThere` when it is used."""

from typing import Any

from stator.dynamo.choices import EngineType, ModelInput, RouterMode, WorkerType
from stator.dynamo.exceptions import HttpError, RouterQueueLimitExceeded
from stator.dynamo.gaps import GAPS, Gap
from stator.dynamo.model import ModelRuntimeConfig, ModelType
from stator.dynamo.publishers import KvEventPublisher, WorkerMetricsPublisher, compute_block_hash_for_seq
from stator.dynamo.registration import fetch_model, lora_name_to_id, register_model, unregister_model

__all__ = [
    "EngineType",
    "HttpError",
    "KvEventPublisher",
    "ModelInput",
    "ModelRuntimeConfig",
    "ModelType",
    "RouterMode",
    "RouterQueueLimitExceeded",
    "WorkerMetricsPublisher",
    "WorkerType",
    "compute_block_hash_for_seq",
    "fetch_llm",
    "fetch_model",
    "lora_name_to_id",
    "register_llm",
    "register_model",
    "unregister_llm",
    "unregister_model",
]

fetch_llm = fetch_model
register_llm = register_model
unregister_llm = unregister_model


def __getattr__(name: str) -> Any:
    """A gap, made when it is asked for. Raises `AttributeError` for what is no name of the reference."""
    if name not in GAPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return Gap(name)
