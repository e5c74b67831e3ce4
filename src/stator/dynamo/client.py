"""Calls an endpoint, with the reference's methods."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

from stator.dynamo.choices import RouterMode
from stator.dynamo.context import Context
from stator.dynamo.errors import InvalidType, InvalidValue, NotSendable, call_failed, is_of_stream
from stator.dynamo.membership import Membership
from stator.dynamo.stream import AsyncResponseStream
from stator.errors import StatorError, UsageError
from stator.protocol.records import ModelRecord, Query
from stator.routing import LeastLoaded, Policy, PowerOfTwo, RoundRobin, UniformRandom
from stator.runtime import Client as StatorClient
from stator.runtime import Endpoint as StatorEndpoint
from stator.runtime import ResponseStream

__all__ = ["Client"]

_LONGEST_ID = 2**64 - 1


class Client:
    """Made by `Endpoint.client`. Calls are awaited: `stream = await client.random(request)`, then `async for item in stream`.

    `annotated=False` or None asks for plain items. What fails before an instance has accepted the request is a `CallFailed`, later
    a `ValueError`. Unlike the reference's, a call is tried elsewhere as long as nothing was answered.
    """

    def __init__(self, membership: Membership, endpoint: StatorEndpoint, client: StatorClient) -> None:
        self._membership = membership
        self._endpoint = endpoint
        self._client = client
        self._weighted: StatorClient | None = None

    @classmethod
    async def of(cls, membership: Membership, endpoint: StatorEndpoint, mode: RouterMode) -> "Client":
        """A client of `endpoint` whose `generate` chooses as `mode` says."""
        return cls(membership, endpoint, await endpoint.client(_POLICIES[mode]()))

    def instance_ids(self) -> list[int]:
        """Who is listed now; nobody after `shutdown`."""
        return [] if self._membership.closing else self._client.instance_ids()

    async def wait_for_instances(self) -> list[int]:
        """Wait until somebody is listed, without limit; all ids."""
        return await self._client.wait_for_instances(timeout=None)

    async def generate(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call the instance that the client's router mode chooses; any one by default."""
        return await self._call(self._client.generate, request, annotated, context)

    async def random(self, request: Any, annotated: bool | None = True, context: Context | None = None) -> AsyncResponseStream:
        """Call any instance."""
        return await self._call(self._client.random, request, annotated, context)

    async def round_robin(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call each instance in turn."""
        return await self._call(self._client.round_robin, request, annotated, context)

    async def device_aware_weighted(
        self, request: Any, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call the least loaded instance, of those with an accelerator first."""
        if self._weighted is None:
            self._weighted = await self._endpoint.client(_DEVICE_WEIGHTED)
        return await self._call(self._weighted.generate, request, annotated, context)

    async def direct(
        self, request: Any, instance_id: int, annotated: bool | None = True, context: Context | None = None
    ) -> AsyncResponseStream:
        """Call that instance and no other. Raises `TypeError` or `OverflowError` for what is no id."""
        if not isinstance(instance_id, int):  # pyright: ignore[reportUnnecessaryIsInstance]: callers are untyped
            raise InvalidType(f"instance_id must be an integer, not {type(instance_id).__name__}")
        if not 0 <= instance_id <= _LONGEST_ID:
            raise OverflowError(f"instance_id {instance_id} is not an unsigned 64-bit number")
        return await self._call(self._client.direct, request, annotated, context, instance_id)

    async def _call(
        self, call: Any, request: Any, annotated: bool | None, context: Context | None, instance: int | None = None
    ) -> AsyncResponseStream:
        if context is not None and not isinstance(context, Context):  # pyright: ignore[reportUnnecessaryIsInstance]: untyped
            raise InvalidType(f"context must be a Context, not {type(context).__name__}")
        inner = None if context is None else context.for_call()
        try:
            stream: ResponseStream = call(request, inner) if instance is None else call(request, instance, inner)
        except UsageError as error:
            raise NotSendable(error.message) from error
        try:
            await _accepted(stream)
        except UsageError:
            raise
        except StatorError as error:
            if is_of_stream(error):
                return AsyncResponseStream(stream, annotated=bool(annotated), failure=error)
            ids = self.instance_ids()
            listed = bool(ids) if instance is None else instance in ids
            path = "/".join(self._client.endpoint.segments)
            raise call_failed(error, endpoint=path, listed=listed, wanted=instance) from error
        return AsyncResponseStream(stream, annotated=bool(annotated))

    async def wait_for_instance_by_runtime_data(self, key: str, value: str, timeout_s: float | None = None) -> int:
        """Wait until exactly one instance's model card has the text `value` at `key` of its runtime data; its id.

        Raises `TimeoutError` after `timeout_s` seconds; without, it waits for ever.
        """
        if timeout_s is not None and timeout_s < 0:
            raise InvalidValue(f"timeout_s must not be negative, got {timeout_s}")
        runtime = await self._membership.runtime()
        matching: list[int] = []
        try:
            async with (
                asyncio.timeout(timeout_s),
                runtime.discovery.watch(Query(ModelRecord.bucket, self._client.endpoint.segments)) as watch,
            ):
                async for _ in watch:
                    records = [record for record in watch.current.values() if isinstance(record, ModelRecord)]
                    matching = sorted({record.instance_id for record in records if _runtime_data(record).get(key) == value})
                    if len(matching) == 1:
                        return matching[0]
        except TimeoutError:
            raise TimeoutError(
                f'Timed out waiting for one endpoint instance with runtime_data["{key}"] == "{value}"; '
                f"last_match_count={len(matching)}, matching_ids={matching}"
            ) from None
        raise UsageError("the runtime was shut down while it waited for an instance")


_DEVICE_WEIGHTED = "device_weighted"
"""by its name, because its ratio is a setting"""
_POLICIES: dict[RouterMode, Callable[[], Policy | str]] = {
    RouterMode.RoundRobin: RoundRobin,
    RouterMode.Random: UniformRandom,
    RouterMode.PowerOfTwoChoices: PowerOfTwo,
    RouterMode.LeastLoaded: LeastLoaded,
    RouterMode.DeviceAwareWeighted: lambda: _DEVICE_WEIGHTED,
    RouterMode.Direct: UniformRandom,
    RouterMode.KV: UniformRandom,
}
"""The last two choose nothing by themselves: the caller names the instance, or a KV router would."""


async def _accepted(stream: ResponseStream) -> None:
    """Send the request and wait until an instance took it. Cancelled: it was withdrawn."""
    await stream.__aenter__()


def _runtime_data(record: ModelRecord) -> dict[str, Any]:
    config: Any = record.card_json.get("runtime_config")
    data: Any = cast("dict[str, Any]", config).get("runtime_data") if isinstance(config, dict) else None
    return cast("dict[str, Any]", data) if isinstance(data, dict) else {}
