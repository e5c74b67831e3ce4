"""Stator: a distributed runtime for LLM inference.

async with Runtime.connect() as runtime:
    await runtime.endpoint("demo.backend.generate").serve(generate)
"""

from stator.errors import (
    Cancelled,
    ConfigError,
    ConnectFailed,
    Disconnected,
    EngineError,
    NotTrusted,
    Overloaded,
    PeerProtocolError,
    StatorError,
    StreamIncomplete,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.runtime import (
    Client,
    Component,
    Context,
    Conversation,
    Endpoint,
    Engine,
    Namespace,
    Operator,
    ResponseStream,
    Runtime,
    pipeline,
    run,
)

__version__ = "0.1.0"

__all__ = [
    "Cancelled",
    "Client",
    "Component",
    "ConfigError",
    "ConnectFailed",
    "Context",
    "Conversation",
    "Disconnected",
    "Endpoint",
    "Engine",
    "EngineError",
    "Namespace",
    "NotTrusted",
    "Operator",
    "Overloaded",
    "PeerProtocolError",
    "ResponseStream",
    "Runtime",
    "StatorError",
    "StreamIncomplete",
    "Timeout",
    "Unavailable",
    "UsageError",
    "__version__",
    "pipeline",
    "run",
]
