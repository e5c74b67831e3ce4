"""The runtime: join a cluster, serve endpoints, call them. From here down nobody knows what a token is."""

from stator.runtime.client import Client
from stator.runtime.component import Component, Endpoint, Namespace
from stator.runtime.config import RuntimeConfig
from stator.runtime.context import Context
from stator.runtime.conversation import Conversation
from stator.runtime.engine import Engine, Operator, pipeline
from stator.runtime.response import ResponseStream
from stator.runtime.runtime import Runtime
from stator.runtime.served import ServedEndpoint
from stator.runtime.signals import run

__all__ = [
    "Client",
    "Component",
    "Context",
    "Conversation",
    "Endpoint",
    "Engine",
    "Namespace",
    "Operator",
    "ResponseStream",
    "Runtime",
    "RuntimeConfig",
    "ServedEndpoint",
    "pipeline",
    "run",
]
