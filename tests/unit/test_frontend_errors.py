"""The one table of error answers."""

import inspect

import msgspec
import pytest

from stator import errors
from stator.errors import EngineError, Overloaded, StatorError, Timeout, UsageError
from stator.frontend.errors import Failure, Rejected, describe, model_not_found, render
from stator.llm.openai import InvalidRequest

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, StatorError)]
LABELS = {"", "validation", "not_found", "not_implemented", "overload", "unavailable", "internal", "cancelled"}


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
def test_every_error_has_an_answer_that_hides_its_text(kind: type[StatorError]) -> None:
    failure = describe(kind("10.0.0.7 said: secret"), request_id="r-1", model="m")
    assert 500 <= failure.status < 600
    assert "secret" not in failure.message
    assert "r-1" in failure.message
    assert failure.type == "server_error"
    assert failure.label in LABELS


@pytest.mark.parametrize(
    "error", [ValueError("secret"), RecursionError("secret"), UsageError("secret"), ConnectionError("secret")]
)
def test_bugs_are_500_without_details(error: Exception) -> None:
    failure = describe(error, request_id="r-1")
    assert (failure.status, failure.code, failure.label) == (500, "internal", "internal")
    assert "secret" not in failure.message


def test_what_the_client_did_is_told() -> None:
    invalid = InvalidRequest("too hot", param="temperature", code="above", status=422)
    assert describe(invalid, request_id="r") == Failure(status=422, message="too hot", param="temperature", code="above")
    engine = EngineError("ValueError: no", kind="InvalidArgument")
    assert (describe(engine, request_id="r").status, describe(engine, request_id="r").message) == (400, "ValueError: no")
    failure = model_not_found("x" * 1000)
    assert describe(Rejected(failure), request_id="r") is failure
    assert (failure.status, failure.code, failure.param, failure.label) == (404, "model_not_found", "model", "not_found")
    assert len(failure.message) < 300


def test_overload_status_is_configured_and_retried() -> None:
    failure = describe(Overloaded("full"), request_id="r", overload_status=529)
    assert (failure.status, failure.retry, failure.label) == (529, True, "overload")


def test_timeouts_name_the_phase() -> None:
    assert "first item" in describe(Timeout("x", phase="first item"), request_id="r").message


def test_shape_of_the_body() -> None:
    body = msgspec.json.decode(render(Failure(status=400, message="no", param="p", code="c")))
    assert body == {"error": {"message": "no", "type": "invalid_request_error", "param": "p", "code": "c"}}
