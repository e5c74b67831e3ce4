"""The error catalogue: its page is current, and every entry is met by a test that makes it happen."""

import ast
import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from stator import errors
from stator.errors import EngineError, StatorError

ROOT = Path(__file__).parents[2]

MET_BY = {
    "StatorError": ("unit/test_native_client.py", "test_an_error_that_cannot_be_read_still_ends_the_stream"),
    "UsageError": ("loopback/test_compatible_client.py", "test_a_request_that_is_too_large"),
    "ConfigError": (
        "loopback/test_compatible_client.py",
        "test_an_instance_that_cannot_call_a_loopback_address_is_refused_at_once",
    ),
    "PeerProtocolError": ("loopback/test_runtime_serve_call.py", "test_items_come_as_the_type_asked_for"),
    "Unavailable": ("loopback/test_runtime_serve_call.py", "test_a_request_waits_for_an_instance_and_not_for_ever"),
    "Overloaded": ("loopback/test_compatible_client.py", "test_a_refusal_ends_the_request_at_once"),
    "Disconnected": ("loopback/test_compatible_client.py", "test_the_connection_ends_before_the_acknowledgement"),
    "ConnectFailed": (
        "loopback/test_native_dialling.py",
        "test_another_process_at_the_address_is_a_failed_connect_and_gets_no_request",
    ),
    "NotTrusted": ("faults/test_security_refusals.py", "test_a_secret_that_does_not_fit"),
    "StreamIncomplete": ("loopback/test_runtime_retries.py", "test_a_worker_that_dies_after_the_first_item_is_an_error"),
    "Timeout": ("loopback/test_compatible_client.py", "test_no_acknowledgement"),
    "Cancelled": ("loopback/test_runtime_serve_call.py", "test_killing_a_context_ends_its_request_before_the_first_item"),
    "EngineError": ("loopback/test_runtime_retries.py", "test_errors_of_a_handler_are_not_tried_elsewhere"),
    "EngineError InvalidArgument": (
        "loopback/test_runtime_serve_call.py",
        "test_an_error_behind_a_pipeline_reaches_the_caller",
    ),
}
"""entry → the test in which it comes out of what happens between a caller and a worker"""


@cache
def errors_page() -> Any:
    spec = importlib.util.spec_from_file_location("errors_page", ROOT / "docs" / "errors_page.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(error: StatorError) -> str:
    """How `MET_BY` calls it."""
    name = type(error).__name__
    return f"{name} {error.kind}" if isinstance(error, EngineError) and error.kind != "Unknown" else name


def test_the_page_is_current() -> None:
    assert errors_page().main(["--check"]) == 0, "run python docs/errors_page.py"


def test_the_page_has_the_whole_tree() -> None:
    listed = [type(error).__name__ for _, error in errors_page().catalogue()]
    assert set(listed) == set(errors.__all__)
    assert len(listed) == len(errors.__all__) + 1, "one entry each, and InvalidArgument"


def test_every_entry_is_met_by_a_test() -> None:
    assert sorted(MET_BY) == sorted(entry(error) for _, error in errors_page().catalogue())


@pytest.mark.parametrize("entry", MET_BY)
def test_the_test_exists_and_does_not_make_the_error_itself(entry: str) -> None:
    file, name = MET_BY[entry]
    module = ast.parse((ROOT / "tests" / file).read_text("utf-8"))
    (function,) = [node for node in module.body if getattr(node, "name", "") == name]
    kind = entry.split()[0]
    calls = {node.func.id for node in ast.walk(function) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name)}
    assert kind in names, f"{name} says nothing of {kind}"
    assert kind not in calls, f"{name} makes the {kind} itself"
    texts = {node.value for node in ast.walk(function) if isinstance(node, ast.Constant)}
    assert set(entry.split()[1:]) <= texts


@pytest.mark.parametrize("kind", [getattr(errors, name) for name in errors.__all__])
def test_the_catalogue_is_filled_in(kind: type[StatorError]) -> None:
    error = kind("m")
    assert (error.fault, error.advice) != ("", "")
    assert 500 <= error.http_status < 600, "what the client did wrong is known to the frontend, or the handler says so"
    assert "code" in vars(kind) and "advice" in vars(kind), "every class says its own"


def test_codes_are_unique() -> None:
    codes = [getattr(errors, name).code for name in errors.__all__]
    assert len(set(codes)) == len(codes)


def test_an_invalid_argument_is_the_request_s_fault() -> None:
    error = EngineError("m", kind="InvalidArgument")
    assert (error.http_status, error.fault) == (400, "the request")
    assert (EngineError.http_status, EngineError("m").http_status) == (500, 500)
