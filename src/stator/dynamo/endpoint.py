"""Serves and calls one endpoint, with the reference's methods."""

from collections.abc import Callable, Sequence
from typing import Any, cast

from stator.dynamo.choices import RouterMode
from stator.dynamo.client import Client
from stator.dynamo.errors import CallFailed, InvalidType, NotSendable
from stator.dynamo.handler import bidirectional, unary
from stator.dynamo.membership import Membership
from stator.dynamo.metrics import RuntimeMetrics
from stator.errors import EngineError, UsageError
from stator.protocol.ids import EndpointId
from stator.protocol.values import encode_json
from stator.runtime import Runtime, ServedEndpoint

__all__ = ["Endpoint"]


class Endpoint:
    """Made by `DistributedRuntime.endpoint`."""

    def __init__(self, membership: Membership, id: EndpointId) -> None:
        self._membership = membership
        self._id = id

    def __repr__(self) -> str:
        return f"<Endpoint {self._id}>"

    @property
    def membership(self) -> Membership:
        """The runtime it belongs to."""
        return self._membership

    @property
    def id(self) -> EndpointId:
        """Its name."""
        return self._id

    async def serve_endpoint(
        self,
        generator: Callable[..., Any],
        graceful_shutdown: bool = True,
        metrics_labels: Sequence[tuple[str, str]] | None = None,
        health_check_payload: dict[str, Any] | None = None,
    ) -> None:
        """Serve until `shutdown`; returns when the cluster is left, at once if that has happened.

        `generator` is an async generator function of `(request)`, or of `(request, context)` with that name. With
        `graceful_shutdown` running requests may finish, at most `shutdown_timeout` seconds; without, they end at once.
        `metrics_labels` are put on the endpoint's metrics, `health_check_payload` is what the canary sends.

        Cancelling it stops serving at once, where the reference goes on. Raises `TypeError` and `UsageError` for arguments, and for
        an endpoint that is served already.
        """
        payload = _payload(health_check_payload)
        await self._serve(
            unary(generator), graceful_shutdown, {"metrics_labels": _labels(metrics_labels), "canary_payload": payload}
        )

    async def serve_bidirectional_endpoint(
        self,
        generator: Callable[..., Any],
        graceful_shutdown: bool = True,
        metrics_labels: Sequence[tuple[str, str]] | None = None,
    ) -> None:
        """`serve_endpoint` for a handler whose first argument is a `PyAsyncRequestStream`."""
        labels = _labels(metrics_labels)
        await self._serve(bidirectional(generator), graceful_shutdown, {"metrics_labels": labels, "bidirectional": True})

    async def _serve(self, generate: Any, graceful: bool, options: dict[str, Any]) -> None:
        membership = self._membership
        if membership.closing:
            return
        runtime = await membership.runtime()
        served = await self._start(runtime, generate, options)
        membership.served[self._id] = served
        try:
            await runtime.wait_for_shutdown()
            if not graceful:
                await served.aclose()
            await membership.left()
        except BaseException:
            await served.aclose()
            raise
        finally:
            del membership.served[self._id]

    async def _start(self, runtime: Runtime, generate: Any, options: dict[str, Any]) -> ServedEndpoint:
        """Begin to serve; leaving the runtime drains it."""
        return await runtime.endpoint(str(self._id)).start(generate, **options)

    async def client(self, router_mode: RouterMode | None = None) -> Client:
        """A client of this endpoint. `router_mode` says how its `generate` chooses: any instance by default."""
        if router_mode is not None and not isinstance(router_mode, RouterMode):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidType(f"router_mode must be a RouterMode, not {type(router_mode).__name__}")
        endpoint = (await self._membership.runtime()).endpoint(str(self._id))
        return await Client.of(self._membership, endpoint, RouterMode.Random if router_mode is None else router_mode)

    def connection_id(self) -> int:
        """The instance id of this process. Raises `UsageError` before the runtime is connected."""
        return self._membership.now("connection_id()").instance_id

    @property
    def metrics(self) -> RuntimeMetrics:
        """For metrics of the endpoint's author."""
        return RuntimeMetrics(self._membership, self._id)

    async def unregister_endpoint_instance(self) -> None:
        """Take the served endpoint out of discovery: no new requests come, unless sent by those who have not heard.

        Raises `CallFailed` when it is served and not listed. Does nothing for an endpoint that this process does not serve.
        """
        served = self._membership.served.get(self._id)
        if served is None:
            await self._membership.runtime()
            return
        if not served.listed:
            raise CallFailed("Unable to unregister endpoint instance from discovery: it is not registered")
        await served.unregister()

    async def register_endpoint_instance(self) -> None:
        """Put it back. Raises `UsageError` for an endpoint that this process does not serve: nobody could call it."""
        served = self._membership.served.get(self._id)
        if served is None:
            raise UsageError(f"{self._id} is not served by this process; serve_endpoint registers it")
        await served.register()


def _labels(given: object) -> tuple[tuple[str, str], ...]:
    """Raises `TypeError` for anything but a sequence of pairs of texts."""
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise InvalidType(f"metrics_labels must be a list of pairs of texts, not {type(given).__name__}")
    labels: list[tuple[str, str]] = []
    for pair in cast("list[object]", given):
        match pair:
            case (str(key), str(value)):
                labels.append((key, value))
            case _:
                raise InvalidType(f"metrics_labels must be pairs of texts, not {pair!r}")
    return tuple(labels)


def _payload(given: object) -> dict[str, Any] | None:
    """Raises `TypeError` for anything but a dict that has a JSON form."""
    if given is None:
        return None
    if not isinstance(given, dict):
        raise InvalidType(f"health_check_payload must be a dict, not {type(given).__name__}")
    payload = cast("dict[str, Any]", given)
    try:
        encode_json(payload)
    except EngineError as error:
        raise NotSendable(f"health_check_payload: {error.message}") from error
    return payload
