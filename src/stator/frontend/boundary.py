"""The outermost layer of every request: ids, draining, errors as JSON, one log line."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

from stator.errors import StatorError
from stator.frontend.doors import enter
from stator.frontend.errors import DRAINING, Failure, Rejected, describe, render
from stator.frontend.state import SERVER, STATE, TICKET, FrontendState
from stator.frontend.ticket import Ticket

__all__ = ["boundary", "describe_logged", "failure_response"]

logger = logging.getLogger(__name__)

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_ALWAYS_SERVED = ("/metrics",)
_OWNDRAINING_ANSWER = ("/health", "/live")
_OUR_REFUSALS = ("overload", "unavailable", "rate_limit")
"""labels of failures that cost a request's API key nothing"""


@web.middleware
async def boundary(request: web.Request, handler: _Handler) -> web.StreamResponse:
    """Whatever a handler raises leaves here as an OpenAI-shaped answer, except the cancellation by a client that is gone."""
    state = request.app[STATE]
    ticket = request[TICKET] = Ticket(request.headers, new_id=state.new_id, now=state.clock.monotonic())
    outcome = "cancelled"
    try:
        response = await _answer(request, handler, state, ticket)
        outcome = str(response.status)
    finally:
        if ticket.meter is not None:
            label = ticket.failure.label if ticket.failure else "cancelled" if outcome == "cancelled" else ""
            ticket.meter.end(error_type=label, now=state.clock.monotonic())
        if ticket.grant is not None:
            for_nothing = ticket.failure is not None and ticket.failure.label in _OUR_REFUSALS
            ticket.grant.end(state.clock.monotonic(), for_nothing=for_nothing)
        _log(state, ticket, request, outcome)
    if not response.prepared:
        response.headers["x-request-id"] = ticket.shown_id
        response.headers["Server"] = SERVER
        if ticket.account is not None and ticket.endpoint:
            response.headers.update(ticket.account.headers(state.clock.monotonic()))
        if state.draining:
            response.force_close()
    return response


async def _answer(request: web.Request, handler: _Handler, state: FrontendState, ticket: Ticket) -> web.StreamResponse:
    try:
        if state.draining and request.path not in _ALWAYS_SERVED and request.path not in _OWNDRAINING_ANSWER:
            ticket.failure = DRAINING
        else:
            if state.keys is not None:
                ticket.account = enter(request, state.keys)
            return await handler(request)
    except web.HTTPException as error:
        ticket.failure = _from_aiohttp(request, error)
        response = failure_response(ticket.failure, state)
        response.headers.extend({k: v for k, v in error.headers.items() if k == "Allow"})
        return response
    except ConnectionError as error:
        if isinstance(error, StatorError):
            ticket.failure = describe_logged(error, state, ticket)
        else:
            raise  # the client is gone; aiohttp closes the connection
    except Exception as error:
        ticket.failure = describe_logged(error, state, ticket)
    return failure_response(ticket.failure, state)


def describe_logged(error: Exception, state: FrontendState, ticket: Ticket) -> Failure:
    """`describe`, with what the client must not see in the log. Our own refusals are no news one by one: `Gate` reports them."""
    failure = describe(error, request_id=ticket.shown_id, model=ticket.model, overload_status=state.config.overload_status)
    if failure.status >= 500 and not (isinstance(error, Rejected) and failure.label == "overload"):
        bug = not isinstance(error, StatorError)
        facts = {"request_id": ticket.shown_id, "model": ticket.model[:200]}
        level = logging.ERROR if bug else logging.WARNING
        logger.log(level, "request failed: %s: %s", type(error).__name__, error, exc_info=error if bug else None, extra=facts)
    return failure


def failure_response(failure: Failure, state: FrontendState) -> web.Response:
    """An error answer that has not begun yet."""
    response = web.Response(status=failure.status, body=render(failure), content_type="application/json")
    if failure.retry:
        response.headers["Retry-After"] = str(failure.retry_after or state.config.retry_after)
    response.headers.update(failure.headers)
    return response


def _from_aiohttp(request: web.Request, error: web.HTTPException) -> Failure:
    """404 and 405 of the router, and whatever aiohttp itself refuses."""
    where = f"{request.method} {request.path[:200]}"
    if isinstance(error, web.HTTPMethodNotAllowed):
        return Failure(status=405, message=f"Method not allowed: {where}.", code="method_not_allowed")
    if error.status == 404:
        return Failure(status=404, message=f"Unknown path: {where}.", code="unknown_url", label="not_found")
    return Failure(status=error.status, message=f"{error.reason}: {where}.")


def _log(state: FrontendState, ticket: Ticket, request: web.Request, outcome: str) -> None:
    """One line per request to a model; the other routes only when debugging."""
    log = state.log
    if not (log.enabled if ticket.endpoint else log.debugging):
        return
    now = state.clock.monotonic()
    fields: dict[str, Any] = {"request_id": ticket.shown_id}
    if ticket.shown_id != ticket.id:
        fields["id"] = ticket.id
    fields["outcome"] = "cancelled" if outcome == "cancelled" else "error" if ticket.failure else "ok"
    if outcome != "cancelled":
        fields["status"] = int(outcome)
    if ticket.failure is not None:
        fields["error"] = ticket.failure.code or ticket.failure.label
    if ticket.account is not None:
        fields["key"] = ticket.account.name
    if ticket.endpoint:
        fields |= {"endpoint": ticket.endpoint, "model": ticket.model, "stream": ticket.stream}
    fields |= ticket.meter.summary(now) if ticket.meter else {"duration_ms": round((now - ticket.began) * 1e3, 3)}
    if ticket.admission is not None and (waited := ticket.admission.waited) > 0:
        fields["queue_ms"] = round(waited * 1e3, 3)
    fields |= {"method": request.method, "uri": request.path}
    level = logging.INFO if ticket.endpoint else logging.DEBUG
    began = ticket.began if ticket.endpoint else 0.0
    log.write("http request completed", fields, level=level, trace=ticket.trace, span="http-request", began=began)
