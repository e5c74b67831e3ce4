"""Events as part of a runtime: opened with it, closed with it, after what it serves and before discovery."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from stator.discovery.memory import MemoryStore
from stator.events import MemoryBus
from stator.protocol.records import EventChannelRecord
from stator.runtime import Context, Runtime
from stator.testing.event_suite import LOAD, RECORDS, link, open_files, payloads, take
from stator.testing.nats_server import nats_server
from stator.transports.memory import MemoryNetwork

pytestmark = pytest.mark.timeout(60)


async def talk(one: Runtime, other: Runtime) -> None:
    """From one to the other."""
    publisher, heard = await one.events.publisher(LOAD), await other.events.subscribe(LOAD)
    await link(publisher, heard)
    publisher.publish(b"hello")
    assert payloads(await take(heard, 1)) == [b"hello"]


async def test_runtimes_of_one_store_hear_each_other() -> None:
    store = MemoryStore()
    async with (
        Runtime.connect(discovery=store, plane="memory") as one,
        Runtime.connect(discovery=store, plane="memory") as other,
    ):
        await talk(one, other)
        assert len(store.records) == 1
        await talk(other, one)
    assert store.records == {}
    assert store.shared(MemoryBus).empty


async def test_runtimes_of_one_bus_hear_each_other(tmp_path: Path) -> None:
    bus = MemoryBus()
    async with (
        Runtime.connect(discovery="file", file__root=str(tmp_path), event_plane=bus) as one,
        Runtime.connect(discovery="file", file__root=str(tmp_path), event_plane=bus) as other,
    ):
        await talk(one, other)


async def test_over_zmq_and_files_by_default(tmp_path: Path) -> None:
    async def live() -> None:
        async with (
            Runtime.connect(discovery="file", file__root=str(tmp_path)) as one,
            Runtime.connect(discovery="file", file__root=str(tmp_path)) as other,
        ):
            await talk(one, other)
            record = (await one.discovery.list(RECORDS))[0]
            assert isinstance(record, EventChannelRecord)
            assert record.transport.kind == "Zmq"
            assert record.transport.config["endpoint"].startswith("tcp://127.0.0.1:")
        assert list((tmp_path / EventChannelRecord.bucket).iterdir()) == []

    await live()
    tasks, files = len(asyncio.all_tasks()), open_files()
    await live()
    assert (len(asyncio.all_tasks()), open_files()) == (tasks, files)


async def test_over_nats(tmp_path: Path) -> None:
    store = MemoryStore()
    with nats_server(tmp_path) as server:
        settings: dict[str, Any] = {"discovery": store, "event_plane": "nats", "nats__servers": server.url}
        async with Runtime.connect(**settings) as one, Runtime.connect(**settings) as other:
            await talk(one, other)


async def test_settings_of_events_are_arguments_too() -> None:
    async with Runtime.connect(discovery=MemoryStore(), plane="memory", events__queue_capacity=2) as runtime:
        heard, publisher = await runtime.events.subscribe(LOAD), await runtime.events.publisher(LOAD)
        for payload in (b"1", b"2", b"3"):
            publisher.publish(payload)
        assert payloads(await take(heard, 2)) == [b"2", b"3"]


async def test_what_is_served_may_publish_until_it_has_drained() -> None:
    store, network = MemoryStore(), MemoryNetwork()
    async with Runtime.connect(discovery=store, plane=network) as listener, await listener.events.subscribe(LOAD) as heard:
        started = asyncio.Event()
        async with Runtime.connect(discovery=store, plane=network) as worker:
            publisher = await worker.events.publisher(LOAD)

            async def handler(request: Any, context: Context) -> AsyncIterator[int]:
                started.set()
                await worker.wait_for_shutdown()
                await asyncio.sleep(0.05)
                publisher.publish(b"the last request is done")
                yield 1

            path = worker.endpoint("demo.backend.generate")
            async with asyncio.TaskGroup() as group:
                group.create_task(path.serve(handler))
                client = await listener.endpoint("demo.backend.generate").client()
                await client.wait_for_instances()
                answer = group.create_task(client.generate({}).collect())
                await asyncio.wait_for(started.wait(), 10)
                worker.shutdown()
            assert answer.result() == [1]
        assert payloads(await take(heard, 1)) == [b"the last request is done"]
        assert not [key for key in store.records if RECORDS.matches(key)]
