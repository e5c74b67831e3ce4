"""`dynamo.runtime`: the runtime, its decorators, clients and contexts."""

from stator.dynamo.annotated import Annotated
from stator.dynamo.client import Client
from stator.dynamo.context import Context
from stator.dynamo.decorators import dynamo_endpoint, dynamo_worker
from stator.dynamo.distributed import Component, DistributedRuntime, Namespace
from stator.dynamo.endpoint import Endpoint
from stator.dynamo.request_stream import PyAsyncRequestStream

__all__ = [
    "Annotated",
    "Client",
    "Component",
    "Context",
    "DistributedRuntime",
    "Endpoint",
    "Namespace",
    "PyAsyncRequestStream",
    "dynamo_endpoint",
    "dynamo_worker",
]
