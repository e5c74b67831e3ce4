"""The one table from our errors to what an OpenAI client sees. Statuses are those of the errors themselves (`stator.errors`).

Shape of every error body: `{"error": {"message", "type", "param", "code"}}`. What a client did wrong is told in full; what went
wrong inside is told by kind and request id only, the log has the rest under the same id.
"""

import math
from typing import Any, Literal

import msgspec

from stator.errors import (
    Cancelled,
    Disconnected,
    EngineError,
    Overloaded,
    PeerProtocolError,
    StatorError,
    Timeout,
    Unavailable,
    UsageError,
)
from stator.llm.openai import InvalidRequest

__all__ = [
    "DRAINING",
    "Failure",
    "Rejected",
    "describe",
    "model_not_found",
    "overloaded",
    "rate_limited",
    "render",
    "unauthorized",
]


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """How one failed request is answered. `label` is `error_type` of the metrics (`spec/30 §8.1`)."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    label: str = "validation"
    retry: bool = False
    """the answer carries Retry-After"""
    retry_after: int = 0
    """what it says, in seconds; 0: what `http.retry_after` says"""
    headers: tuple[tuple[str, str], ...] = ()
    """what else stands in the head of the answer"""

    def as_error(self) -> dict[str, Any]:
        """The object under `error`."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}


class Rejected(UsageError):
    """The frontend itself answers with `failure`; nothing was sent to a worker, or what was sent is given up."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.message)
        self.failure = failure


DRAINING = Failure(
    status=Unavailable.http_status,
    message="The service is shutting down.",
    type="server_error",
    code="unavailable",
    label="unavailable",
    retry=True,
)


_TABLE: tuple[tuple[type[StatorError], str, str, bool, str], ...] = (
    # error, code, metric label, Retry-After, text
    (Overloaded, "overloaded", "overload", True, "All workers of the model `{model}` are at capacity; try again later."),
    (Unavailable, "unavailable", "unavailable", True, "No worker of the model `{model}` is ready; try again shortly."),
    (Timeout, "timeout", "internal", False, "The worker did not answer in time{phase}."),
    (Disconnected, "worker_lost", "internal", False, "The connection to the worker was lost before the answer was complete."),
    (PeerProtocolError, "bad_worker", "internal", False, "The worker sent an answer that cannot be read."),
    (Cancelled, "cancelled", "cancelled", False, "The request was cancelled by the server."),
    (EngineError, "engine", "internal", False, "The worker failed while answering."),
)


def describe(error: Exception, *, request_id: str, model: str = "", overload_status: int = Overloaded.http_status) -> Failure:
    """What the client is told about `error`. Never fails and never shows internals."""
    if isinstance(error, Rejected):
        failure = error.failure
        if failure.label == "overload":
            failure = msgspec.structs.replace(failure, message=f"{failure.message} Request id: {request_id}")
        return failure
    if isinstance(error, InvalidRequest):
        return Failure(status=error.status, message=error.message, param=error.param, code=error.openai_code)
    if isinstance(error, EngineError) and error.kind == "InvalidArgument":
        return Failure(status=error.http_status, message=error.message, code="invalid_argument")
    for kind, code, label, retry, text in _TABLE:
        if isinstance(error, kind):
            status = overload_status if kind is Overloaded else error.http_status
            phase = f" (waiting for: {error.phase})" if error.phase else ""
            message = f"{text.format(model=model, phase=phase)} Request id: {request_id}"
            return Failure(status=status, message=message, type="server_error", code=code, label=label, retry=retry)
    return Failure(
        status=StatorError.http_status,
        message=f"The server failed while handling the request. Request id: {request_id}",
        type="server_error",
        code="internal",
        label="internal",
    )


def overloaded(text: str, *, retry_after: int, status: int = Overloaded.http_status) -> Failure:
    """A request is refused for want of capacity; `text` says which limit it is."""
    return Failure(
        status=status,
        message=f"{text}; try again in {retry_after} s.",
        type="server_error",
        code="overloaded",
        label="overload",
        retry=True,
        retry_after=retry_after,
    )


_HAIR = 1e-6
"""seconds: no more than rounding makes of a wait"""


def rate_limited(text: str, *, kind: Literal["requests", "tokens"], wait: float | None) -> Failure:
    """429 as OpenAI answers it; `text` says which limit it is, `wait` after how many seconds there is room (None: never)."""
    if wait is None:
        message, headers = f"{text}, more than the limit ever allows.", (("x-should-retry", "false"),)
    else:
        message = f"{text}; try again in {wait:.3g} s."
        headers = (
            ("retry-after-ms", str(math.ceil((wait - _HAIR) * 1000) + 1)),
        )  # the official clients prefer it to whole seconds
    return Failure(
        status=429,
        message=message,
        type=kind,
        code="rate_limit_exceeded",
        label="rate_limit",
        retry=wait is not None,
        retry_after=max(1, math.ceil((wait or 0.0) - _HAIR)),
        headers=headers,
    )


_UNAUTHORIZED = {
    "missing": ("missing_api_key", "No API key was given. Send it in the header `Authorization: Bearer YOUR_KEY`."),
    "invalid": ("invalid_api_key", "The API key is not valid."),
    "expired": ("expired_api_key", "The API key has expired."),
}


def unauthorized(reason: str) -> Failure:
    """401: the key is `missing`, `invalid` or `expired`. What was given as a key is not repeated."""
    code, message = _UNAUTHORIZED[reason]
    return Failure(status=401, message=message, code=code, label="unauthorized", headers=(("WWW-Authenticate", "Bearer"),))


def model_not_found(model: str) -> Failure:
    """404 as OpenAI answers it; the name is cut, since it comes from outside."""
    return Failure(
        status=404,
        message=f"The model `{model[:200]}` does not exist or has no worker.",
        param="model",
        code="model_not_found",
        label="not_found",
    )


def render(failure: Failure) -> bytes:
    """The JSON body of an error answer."""
    return msgspec.json.encode({"error": failure.as_error()})
