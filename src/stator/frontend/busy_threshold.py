"""`/busy_threshold`: when workers count as busy, read and changed while the frontend runs (`spec/40 §3.4`)."""

from collections.abc import Mapping
from typing import Annotated, Any, Protocol

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from stator.errors import UsageError
from stator.frontend.doors import is_local
from stator.frontend.state import STATE
from stator.llm.thresholds import NO_THRESHOLDS, Thresholds

__all__ = ["BusyThreshold", "LoadControl"]


class LoadControl(Protocol):
    """Whoever decides when workers are busy; `llm.monitor.WorkerMonitor` does."""

    def thresholds(self, model: str) -> Thresholds | None:
        """Those in force for `model`; None for a model nobody serves now."""
        ...

    def set_thresholds(
        self,
        model: str,
        *,
        active_decode_blocks_threshold: float | UnsetType | None = UNSET,
        active_prefill_tokens_threshold: int | UnsetType | None = UNSET,
        active_prefill_tokens_threshold_frac: float | UnsetType | None = UNSET,
    ) -> Thresholds:
        """Set what is given; the thresholds now in force. Raises `UsageError` for a model nobody serves, and out of range."""
        ...

    def all_thresholds(self) -> Mapping[str, Thresholds]:
        """Those in force, by name of the models served now."""
        ...


class _Change(msgspec.Struct, frozen=True):
    """The body of a POST. What is null or absent stays as it is; unknown fields are ignored."""

    model: str
    active_decode_blocks_threshold: float | None = None
    active_prefill_tokens_threshold: Annotated[int, msgspec.Meta(ge=0)] | None = None
    active_prefill_tokens_threshold_frac: float | None = None

    def given(self) -> dict[str, Any]:
        """What it sets."""
        values = {name: getattr(self, name) for name in Thresholds.__struct_fields__}
        return {name: value for name, value in values.items() if value is not None}


class BusyThreshold:
    """Handlers of the route. `loopback_only`: others than clients on this machine are answered 403."""

    def __init__(self, control: LoadControl, *, loopback_only: bool) -> None:
        self._control = control
        self._loopback_only = loopback_only

    async def get(self, request: web.Request) -> web.Response:
        """`GET`: the thresholds of all models."""
        if (refusal := self._refusal(request)) is not None:
            return refusal
        return _json({"thresholds": [_entry(model, found) for model, found in self._control.all_thresholds().items()]})

    async def post(self, request: web.Request) -> web.Response:
        """`POST`: set those that the body gives, and answer with those in force."""
        if (refusal := self._refusal(request)) is not None:
            return refusal
        state = request.app[STATE]
        with state.bodies.reading(request, state.wheel) as body:
            data = await body.read()
            try:
                change = msgspec.json.decode(data, type=_Change)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                return _error(422, f"Failed to deserialize the JSON body into the target type: {error}")
        model, given = change.model, change.given()
        decode = change.active_decode_blocks_threshold
        if decode is not None and not 0.0 <= decode <= 1.0:
            return _error(400, f"active_decode_blocks_threshold must be between 0.0 and 1.0, got {decode}")
        found = self._control.thresholds(model)
        if given:
            if found is None:
                text = f"Model '{model[:200]}' not found. Thresholds can only be set for discovered models."
                return _error(404, text)
            try:
                found = self._control.set_thresholds(model, **given)
            except UsageError as error:
                return _error(400, error.message)
        return _json(_entry(model, found or NO_THRESHOLDS))

    def _refusal(self, request: web.Request) -> web.Response | None:
        if not self._loopback_only or is_local(request):
            return None
        return _error(403, "This route is for clients on the same machine (http.admin_api = loopback).")


def _entry(model: str, thresholds: Thresholds) -> dict[str, Any]:
    return {"model": model, **msgspec.structs.asdict(thresholds)}


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _error(status: int, text: str) -> web.Response:
    return _json({"error": text}, status)
