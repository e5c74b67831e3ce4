"""Calls one endpoint: chooses among its instances, sends, retries."""

from collections.abc import AsyncIterable, Mapping
from typing import Any, Literal

import msgspec

from stator.errors import UsageError
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.ids import EndpointId
from stator.protocol.records import EndpointRecord
from stator.protocol.values import encode_json
from stator.routing import (
    ANYWHERE,
    Attempts,
    Availability,
    AvailabilityRow,
    Candidate,
    Direct,
    Policy,
    RetryBudget,
    RoundRobin,
    RouteRequest,
    UniformRandom,
)
from stator.runtime.context import Context
from stator.runtime.conversation import Conversation
from stator.runtime.response import ResponseStream, Route
from stator.runtime.services import Services
from stator.runtime.view import InstanceView
from stator.transports.inbox import Patience

__all__ = ["Client"]

_NO_STRINGS: dict[str, str] = {}

_AT_ONCE = 1e-9
"""seconds left of a deadline that has passed: the request times out when it is opened"""


class Client:
    """The callers' side of one endpoint; made by `Endpoint.client`. Cheap: it shares connections, watch and load table with
    all clients of the runtime. It is an `Engine`: `generate(request, context)` may be the end of a pipeline.
    """

    def __init__(self, services: Services, endpoint: EndpointId, policy: Policy, *, item_type: Any = Any) -> None:
        self._services = services
        self._view: InstanceView = services.view(endpoint)
        self._availability = self._view.availability
        self._policy = policy
        self._item_type = item_type
        routing = services.routing
        self._budget = RetryBudget(services.wheel.now(), ratio=routing.retry_ratio, rate=routing.retry_rate)
        self._limits = services.config.limits
        self._patience = Patience(self._limits)
        self._routes: dict[tuple[str, bool], Route] = {}
        self._plain = self._route(policy, ANYWHERE, retry=True)

    @property
    def endpoint(self) -> EndpointId:
        """Whom it calls."""
        return self._view.endpoint

    @property
    def policy(self) -> Policy:
        """How it chooses."""
        return self._policy

    # -- who is there

    def instance_ids(self) -> list[int]:
        """The listed instances, inhibited ones included, sorted."""
        return sorted(self._view.records)

    def instances(self) -> list[EndpointRecord]:
        """Their records, in the same order."""
        return [self._view.records[instance] for instance in self.instance_ids()]

    async def wait_for_instances(self, count: int = 1, *, timeout: float | None = 30.0) -> list[int]:
        """Wait until `count` instances are listed; their ids. Raises `Unavailable` after `timeout` seconds."""
        return await self._view.wait_for(count, timeout)

    def explain(self) -> list[AvailabilityRow]:
        """Each instance, whether it may be chosen, and why not."""
        return self._availability.explain(self._services.wheel.now())

    # -- who may be chosen

    @property
    def view(self) -> InstanceView:
        """The instances; shared with all clients of the endpoint."""
        return self._view

    def set_apart(self) -> Availability:
        """From now on this client has facts of its own, which others at the endpoint do not heed: whom it is restricted to, who is busy."""
        self._availability = self._view.availability.part()
        return self._availability

    def room(self) -> int | None:
        """How many more requests it can give away now, as far as this process knows; None: any number."""
        return self._availability.room(self._services.wheel.now())

    def pressure(self) -> str:
        """Why there is no room, for people; "" if there is."""
        return self._availability.pressure(self._services.wheel.now())

    # -- calling

    def generate(
        self,
        request: Any,
        context: Context | None = None,
        *,
        instance: int | None = None,
        id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        limits: Mapping[str, float | None] | None = None,
        retry: Literal["auto", "never"] = "auto",
    ) -> ResponseStream:
        """Describe a request; it is sent when the stream is entered or first read.

        `request` is any value of the JSON data model. `context` is the context of the request this one belongs to: its id, metadata and
        trace continue, and stopping it stops this one. `instance` pins the request to one instance. `timeout` bounds the whole request,
        `limits` single phases (fields of `PhaseLimits`), in seconds. `retry="never"` is for handlers with side effects.

        Raises `UsageError` at once for a request without JSON form or unknown limits; everything else is raised by the stream.
        """
        patience = self._patience if timeout is None and not limits else self._patience_for(timeout, limits)
        route = self._plain if instance is None and retry == "auto" else self._route_to(instance, retry)
        return self._call(request, context, route, id, metadata, headers, patience)

    def converse(
        self,
        context: Context | None = None,
        *,
        inputs: AsyncIterable[Any] | None = None,
        instance: int | None = None,
        id: str | None = None,
        metadata: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        limits: Mapping[str, float | None] | None = None,
        retry: Literal["auto", "never"] = "auto",
    ) -> Conversation:
        """Describe a bidirectional request; it is sent when the conversation is entered, its inputs as they come.

        `inputs` is sent to its end while the answer is read; without it the caller sends (`Conversation.send`). Everything else is as in
        `generate`.
        """
        patience = self._patience_for(timeout, limits)
        envelope, patience = self._envelope(b"", context, id, metadata, headers, patience, streams_in=True)
        return Conversation(
            self._services,
            self._view,
            envelope,
            self._route_to(instance, retry),
            patience=patience,
            item_type=self._item_type,
            context=context,
            inputs=inputs,
        )

    def _route_to(self, instance: int | None, retry: Literal["auto", "never"]) -> Route:
        if instance is not None:
            return self._route(Direct(), RouteRequest(target=instance), retry=False)
        if retry != "auto":
            return self._route(self._policy, ANYWHERE, retry=False)
        return self._plain

    def round_robin(self, request: Any, context: Context | None = None, **options: Any) -> ResponseStream:
        """`generate`, each instance in turn."""
        return self._by(RoundRobin, request, context, options)

    def random(self, request: Any, context: Context | None = None, **options: Any) -> ResponseStream:
        """`generate`, any instance."""
        return self._by(UniformRandom, request, context, options)

    def direct(self, request: Any, instance: int, context: Context | None = None, **options: Any) -> ResponseStream:
        """`generate`, that instance and no other."""
        return self.generate(request, context, instance=instance, **options)

    def _by(
        self, policy: type[RoundRobin] | type[UniformRandom], request: Any, context: Context | None, options: dict[str, Any]
    ) -> ResponseStream:
        name, retry = policy.__name__, options.pop("retry", "auto") == "auto"
        route = self._routes.get((name, retry))
        if route is None:
            other = self._routes.get((name, not retry))  # one policy object: turns are taken by all of its requests
            route = self._routes[name, retry] = self._route(other.policy if other else policy(), ANYWHERE, retry=retry)
        patience = self._patience_for(options.pop("timeout", None), options.pop("limits", None))
        id, metadata, headers = (options.pop(key, None) for key in ("id", "metadata", "headers"))
        if options:
            raise UsageError(f"unknown options: {', '.join(sorted(options))}")
        return self._call(request, context, route, id, metadata, headers, patience)

    def _patience_for(self, timeout: float | None, limits: Mapping[str, float | None] | None) -> Patience:
        if timeout is None and not limits:
            return self._patience
        changes = dict(limits or {})
        if timeout is not None:
            changes["total"] = timeout
        unknown = changes.keys() - set(self._limits.__struct_fields__)
        if unknown:
            raise UsageError(
                f"unknown limits {', '.join(sorted(unknown))}; there are: {', '.join(self._limits.__struct_fields__)}"
            )
        return Patience(msgspec.structs.replace(self._limits, **changes))

    def _call(
        self,
        request: Any,
        context: Context | None,
        route: Route,
        id: str | None,
        metadata: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        patience: Patience,
    ) -> ResponseStream:
        try:
            payload = encode_json(request)
        except Exception as error:
            raise UsageError(f"the request cannot be sent: {error}") from error
        envelope, patience = self._envelope(payload, context, id, metadata, headers, patience)
        return ResponseStream(
            self._services, self._view, envelope, route, patience=patience, item_type=self._item_type, context=context
        )

    def _envelope(
        self,
        payload: bytes,
        context: Context | None,
        id: str | None,
        metadata: Mapping[str, str] | None,
        headers: Mapping[str, str] | None,
        patience: Patience,
        *,
        streams_in: bool = False,
    ) -> tuple[RequestEnvelope, Patience]:
        """What is sent, and how long all of it may take."""
        if context is not None:
            id = context.id if id is None else id
            metadata = context.metadata if metadata is None else metadata
            headers = context.outgoing_headers() if headers is None else headers
            if context.deadline is not None:
                patience = patience.within(max(context.deadline - self._services.wheel.now(), _AT_ONCE))
        if id is not None:
            _check_id(id)
        envelope = RequestEnvelope(
            id=id if id is not None else self._services.new_id(),
            payload=payload,
            metadata=_strings("metadata", metadata) if metadata else _NO_STRINGS,
            headers=_strings("headers", headers) if headers else _NO_STRINGS,
            deadline=patience.deadline,
            streams_in=streams_in,
        )
        self._budget.count_request(self._services.wheel.now())
        return envelope, patience

    def _route(self, policy: Policy, request: RouteRequest, *, retry: bool) -> Route:
        return Route(policy=policy, request=request, retry=retry, choose=self._choose, attempts=self._attempts)

    def _choose(self, view: InstanceView, policy: Policy, request: RouteRequest) -> Candidate:
        return self._availability.choose(policy, self._services.wheel.now(), request, self._services.random)

    def _attempts(self) -> Attempts:
        return Attempts(self._budget, limit=self._services.routing.attempts)


def _check_id(id: str) -> None:
    """Raises `UsageError` for what cannot be a request id."""
    try:
        id.encode()
    except (AttributeError, UnicodeEncodeError) as error:
        raise UsageError(f"a request id must be a text, got {id!r}") from error
    if not id:
        raise UsageError("a request id must not be empty")


def _strings(what: str, given: Mapping[str, str]) -> dict[str, str]:
    """A copy of a map of texts. A worker would take anything else for a broken connection: raises `UsageError`."""
    try:
        return msgspec.json.decode(msgspec.json.encode(dict(given)), type=dict[str, str])
    except (msgspec.MsgspecError, TypeError, ValueError) as error:
        raise UsageError(f"{what} must map texts to texts: {error}") from error
