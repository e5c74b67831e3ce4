"""Workers and callers that do not speak the same planes, or whose better plane does not answer."""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from stator.errors import ConnectFailed, StatorError
from stator.protocol.records import EndpointRecord, NativeAddress, Transport
from stator.runtime import Client
from stator.testing.cluster import Cluster, echo
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)

OTHER = "f" * 32
"""a process id that nobody has"""


@asynccontextmanager
async def client_of(change: Any, *, plane: str = "auto", **settings: Any) -> AsyncIterator[Client]:
    """A client of a worker that speaks every plane, whose record says what `change` makes of it."""
    async with Cluster.open("auto") as cluster:
        worker = await cluster.worker(echo)
        record = worker.served.record
        await worker.served.unregister()
        ghost = await cluster.join()
        await ghost.discovery.register(change(record))
        client = await cluster.client(plane=plane, **settings)
        await client.wait_for_instances(timeout=5)
        yield client


def native(record: EndpointRecord, **changes: Any) -> EndpointRecord:
    """The record with another native address."""
    assert isinstance(record.stator, NativeAddress)
    return msgspec.structs.replace(record, stator=msgspec.structs.replace(record.stator, **changes))


def fallbacks(client: Client) -> dict[str, int]:
    return client._services.network.fallbacks  # pyright: ignore[reportPrivateUsage]  # a counter without other reader yet


NOT_ANSWERING = {
    "refused": lambda record: native(record, address="127.0.0.1:1", path=""),
    "another process": lambda record: native(record, process=OTHER, path=""),
    "no address": lambda record: native(record, address="nonsense", path=""),
    "no port": lambda record: native(record, address="127.0.0.1:70000", path=""),
}


@pytest.mark.parametrize("change", NOT_ANSWERING.values(), ids=NOT_ANSWERING)
async def test_the_compatible_plane_takes_over(change: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with client_of(change) as client:
        for number in range(5):
            assert await client.generate(number).collect() == [number]
        assert fallbacks(client) == {"connect_failed": 1}
        assert [row.state for row in client.explain()] == ["free"]
    warnings = [entry for entry in caplog.records if entry.levelno == logging.WARNING and "falling back" in entry.getMessage()]
    assert len(warnings) == 1


@pytest.mark.parametrize("change", NOT_ANSWERING.values(), ids=NOT_ANSWERING)
async def test_not_where_the_native_plane_is_demanded(change: Any) -> None:
    async with client_of(change, plane="native") as client:
        for _ in range(2):
            with pytest.raises(ConnectFailed):
                await client.generate(1).collect()
        assert fallbacks(client) == {}


async def test_a_worker_without_native_plane_is_called_by_the_other() -> None:
    async with client_of(lambda record: msgspec.structs.replace(record, stator=msgspec.UNSET)) as client:
        assert await client.generate(1).collect() == [1]
        assert fallbacks(client) == {}


async def test_a_worker_of_a_future_version_is_called_all_the_same() -> None:
    async with client_of(lambda record: native(record, plane=7)) as client:
        assert await client.generate(1).collect() == [1]


async def test_no_plane_in_common() -> None:
    def native_only(record: EndpointRecord) -> EndpointRecord:
        return msgspec.structs.replace(record, transport=Transport())

    async with client_of(native_only, plane="compatible") as client:
        with pytest.raises(ConnectFailed, match="planes in use"):
            await client.generate(1).collect()
    async with client_of(native_only) as client:
        assert await client.generate(1).collect() == [1]


@pytest.mark.parametrize("plane", ["native", "compatible"])
async def test_one_worker_serves_callers_of_every_plane(plane: str) -> None:
    async with Cluster.open("auto") as cluster:
        await cluster.worker(echo)
        client = await cluster.client(plane=plane)
        assert await client.generate(plane).collect() == [plane]


async def test_a_worker_that_cannot_be_reached_at_all_is_avoided() -> None:
    async with Cluster.open("auto") as cluster:
        worker = await cluster.worker(echo)
        dead = await cluster.worker(echo)
        record = dead.served.record
        await cluster.leave(dead.runtime)
        ghost = await cluster.join()
        await ghost.discovery.register(record)
        client = await cluster.client()
        await client.wait_for_instances(2, timeout=5)
        for number in range(4):
            assert await client.generate(number).collect() == [number]
        with pytest.raises(StatorError):
            await client.direct(1, dead.id).collect()
        await eventually(lambda: {row.instance_id: row.state for row in client.explain()}[dead.id] == "inhibited")
        assert {row.instance_id: row.state for row in client.explain()}[worker.id] == "free"
