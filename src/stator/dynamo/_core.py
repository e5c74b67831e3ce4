"""`dynamo._core`: all names of the reference's extension module in one place. Those that Stator does not have are `Gap`s."""

from collections.abc import AsyncIterator, Callable
from typing import Any

from stator.dynamo.choices import EngineType, ModelInput, RouterMode, WorkerType
from stator.dynamo.client import Client
from stator.dynamo.context import Context
from stator.dynamo.distributed import DistributedRuntime
from stator.dynamo.endpoint import Endpoint
from stator.dynamo.exceptions import (
    Cancelled,
    CannotConnect,
    ConnectionTimeout,
    Disconnected,
    DynamoException,
    EngineShutdown,
    InvalidArgument,
    RouterQueueLimitExceeded,
    SelectionServiceError,
    StreamIncomplete,
    Unknown,
)
from stator.dynamo.gaps import GAPS, Gap
from stator.dynamo.metadata import ContextMetadata
from stator.dynamo.metrics import RuntimeMetrics
from stator.dynamo.model import ModelDeploymentCard, ModelRuntimeConfig, ModelType
from stator.dynamo.publishers import KvEventPublisher, WorkerMetricsPublisher, compute_block_hash_for_seq
from stator.dynamo.registration import fetch_model, lora_name_to_id, register_model, unregister_model
from stator.dynamo.request_stream import PyAsyncRequestStream
from stator.dynamo.span import SpanProxy
from stator.dynamo.stream import AsyncResponseStream

__all__ = [
    "AsyncResponseStream",
    "Cancelled",
    "CannotConnect",
    "Client",
    "ConnectionTimeout",
    "Context",
    "ContextMetadata",
    "Disconnected",
    "DistributedRuntime",
    "DynamoException",
    "Endpoint",
    "EngineShutdown",
    "EngineType",
    "InvalidArgument",
    "JsonLike",
    "KvEventPublisher",
    "ModelDeploymentCard",
    "ModelInput",
    "ModelRuntimeConfig",
    "ModelType",
    "PyAsyncRequestStream",
    "RequestHandler",
    "RouterMode",
    "RouterQueueLimitExceeded",
    "RuntimeMetrics",
    "SelectionServiceError",
    "SpanProxy",
    "StreamIncomplete",
    "Unknown",
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

JsonLike = Any
RequestHandler = Callable[..., AsyncIterator[JsonLike]]

fetch_llm = fetch_model
register_llm = register_model
unregister_llm = unregister_model


def __getattr__(name: str) -> Any:
    """A gap, made when it is asked for. Raises `AttributeError` for what is no name of the reference."""
    if name not in GAPS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return Gap(name)
