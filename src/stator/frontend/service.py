"""The routes that generate nothing: models, health, liveness, metrics (`spec/50 §1`)."""

from typing import Any

import msgspec
from aiohttp import web

from stator.frontend.errors import Rejected, model_not_found
from stator.frontend.key_account import KeyAccount
from stator.frontend.state import STATE, TICKET
from stator.llm.served import ServedModel
from stator.telemetry import CONTENT_TYPE

__all__ = ["health", "live", "metrics", "model", "models"]


def _json(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def _entry(served: ServedModel) -> dict[str, Any]:
    entry = {"id": served.name, "object": "model", "created": int(served.created), "owned_by": "stator"}
    if served.card.context_length:
        entry["context_window"] = served.card.context_length
    return entry


def _account(request: web.Request) -> KeyAccount | None:
    return request[TICKET].account


async def models(request: web.Request) -> web.Response:
    """`GET /v1/models`: what has a worker now, and the API key allows."""
    account = _account(request)
    models = request.app[STATE].source.models()
    return _json(
        {
            "object": "list",
            "data": [_entry(served) for served in models if account is None or account.record.allows(served.name)],
        }
    )


async def model(request: web.Request) -> web.Response:
    """`GET /v1/models/{id}`; the id may contain slashes."""
    name = request.match_info["id"]
    if (account := _account(request)) is not None:
        account.check_model(name)
    served = request.app[STATE].source.get(name)
    if served is None:
        raise Rejected(model_not_found(name))
    return _json(_entry(served))


async def health(request: web.Request) -> web.Response:
    """`GET /health`: ready for requests, and for which models. Healthy without any worker too."""
    state = request.app[STATE]
    if state.draining:
        return _json({"status": "not_ready", "stage": "draining", "message": "Service is not ready"}, 503)
    instances = [
        {"model": served.name, "instance_id": instance} for served in state.source.models() for instance in served.instances()
    ]
    return _json({"status": "healthy", "instances": instances})


async def live(request: web.Request) -> web.Response:
    """`GET /live`: this process runs its event loop."""
    if request.app[STATE].draining:
        return _json({"status": "shutting_down", "message": "Service is shutting down"}, 503)
    return _json({"status": "live", "message": "Service is live"})


async def metrics(request: web.Request) -> web.Response:
    """`GET /metrics`: the Prometheus page of this process."""
    page = request.app[STATE].metrics.page.exposition()
    return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE})
