"""What the frontend knows about one HTTP request, from its arrival to its log line."""

import asyncio
import re
from collections.abc import Callable, Mapping
from uuid import UUID

from stator.errors import StatorError
from stator.frontend.errors import Failure
from stator.frontend.gate import Admission
from stator.frontend.key_account import Grant, KeyAccount
from stator.frontend.metrics import RequestMeter
from stator.telemetry import TraceContext, request_id_of

__all__ = ["Ticket", "propagated_headers", "request_metadata"]

_SHOWABLE = re.compile(r"[!-~]{1,200}")
_METADATA = "x-dynamo-meta-"


class Ticket:
    """Ids, place in the log, and the way to end a request from outside."""

    __slots__ = (
        "_task",
        "aborted",
        "account",
        "admission",
        "began",
        "endpoint",
        "failure",
        "grant",
        "id",
        "meter",
        "model",
        "shown_id",
        "stream",
        "trace",
    )

    def __init__(self, headers: Mapping[str, str], *, new_id: Callable[[], str], now: float) -> None:
        wanted = headers.get("x-dynamo-request-id", "")
        self.id = _canonical(wanted) or new_id()
        """id at the workers and in `chatcmpl-<id>`: the client's `x-dynamo-request-id` if that is a UUID (`spec/50 §9`)"""
        given = headers.get("x-request-id", "")
        self.shown_id = given if _SHOWABLE.fullmatch(given) else self.id
        """id in the answer's `x-request-id`, in messages and in the log: the client's own, if it has one"""
        self.began = now
        self.endpoint = ""
        self.model = ""
        self.stream = False
        self.meter: RequestMeter | None = None
        self.failure: Failure | None = None
        self.admission: Admission | None = None
        """its place at the workers, or in the queue before them"""
        self.account: KeyAccount | None = None
        """that of its API key, where keys are asked for"""
        self.grant: Grant | None = None
        """what its key lets it use"""
        self.trace: TraceContext | None = None
        self.aborted: StatorError | None = None
        self._task: asyncio.Task[object] | None = None

    def enter(self) -> None:
        """The current task answers this request from now on."""
        self._task = asyncio.current_task()

    def leave(self) -> None:
        """It no longer does; `abort` has no effect any more."""
        self._task = None

    def abort(self, error: StatorError) -> None:
        """End the request with `error` as if the worker had failed so. No effect when it is over."""
        if self._task is not None and self.aborted is None:
            self.aborted = error
            self._task.cancel("request aborted")

    def recover(self, cancelled: asyncio.CancelledError) -> StatorError:
        """Turn the cancellation that `abort` caused into its error; re-raise any other (the client is gone)."""
        if self.aborted is None or self._task is None:
            raise cancelled
        self._task.uncancel()
        self._task = None
        return self.aborted


def _canonical(text: str) -> str:
    """`text` as a UUID in lower case with hyphens; "" if it is none."""
    try:
        return str(UUID(text)) if len(text) in (32, 36) else ""
    except ValueError:
        return ""


def propagated_headers(headers: Mapping[str, str], trace: TraceContext | None) -> dict[str, str]:
    """The trace and the client's request id, as they travel in the envelope (`spec/10 §9`): the worker's span is below `trace`."""
    if trace is not None:
        return trace.headers()
    given = request_id_of(headers)
    return {"x-request-id": given} if given else {}


def request_metadata(headers: Mapping[str, str]) -> dict[str, str]:
    """`x-dynamo-meta-<name>: value` as `{name: value}` (`spec/50 §9`)."""
    found: dict[str, str] = {}
    for name, value in headers.items():
        lowered = name.lower()
        if lowered.startswith(_METADATA) and len(lowered) > len(_METADATA):
            found[lowered.removeprefix(_METADATA)] = value
    return found
