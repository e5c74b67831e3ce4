"""What users may import: a change here is a change of the public interface and belongs into the changelog."""

import importlib
import subprocess
import sys

import pytest

import stator

pytestmark = pytest.mark.timeout(60)

PUBLIC = [
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

RUNTIME = [
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


def test_the_package_exports_what_is_written_here() -> None:
    assert stator.__all__ == PUBLIC
    assert sorted(PUBLIC) == PUBLIC


def test_the_room_exports_what_is_written_here() -> None:
    assert importlib.import_module("stator.runtime").__all__ == RUNTIME


@pytest.mark.parametrize(
    "room", ["stator", "stator.errors", "stator.runtime", "stator.routing", "stator.tasks", "stator.transports.native"]
)
def test_every_exported_name_is_there(room: str) -> None:
    module = importlib.import_module(room)
    for name in module.__all__:
        assert getattr(module, name) is not None


def test_every_error_is_public() -> None:
    assert set(importlib.import_module("stator.errors").__all__) <= set(PUBLIC)


def test_importing_the_package_is_light() -> None:
    """No web server, no model library, no testing kit: a worker that serves one function needs none of them."""
    code = "import sys, stator; print(' '.join(sorted(sys.modules)))"
    loaded = set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())
    heavy = {"aiohttp", "torch", "transformers", "tokenizers", "typer", "prometheus_client", "stator.testing", "stator.llm"}
    assert not loaded & heavy
