"""The etcd backend is a discovery, and its keys and values are the reference's."""

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.discovery.etcd import EtcdConfig, EtcdDiscovery, open_etcd
from stator.errors import UsageError
from stator.protocol.records import EndpointRecord, EventChannelRecord, ModelRecord, Query, RecordKey, Transport, encode_record
from stator.tasks import SystemClock
from stator.testing.discovery_suite import (
    Connect,
    StoredDiscoverySuite,
    channel_record,
    endpoint_record,
    model_record,
    until,
)
from stator.testing.etcd_server import EtcdServer, etcd_server

ENDPOINTS = Query(EndpointRecord.bucket)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path_factory.mktemp("etcd")) as server:
        yield server


def discovery(etcd: EtcdServer, **settings: Any) -> EtcdDiscovery:
    return open_etcd(EtcdConfig(endpoints=(etcd.url,), **settings), clock=SystemClock(), random=Random())


class TestEtcdDiscovery(StoredDiscoverySuite):
    @pytest.fixture(autouse=True)
    def shared_server(self, etcd: EtcdServer) -> None:
        self.etcd = etcd

    @asynccontextmanager
    async def cluster(self) -> AsyncIterator[Connect]:
        yield lambda: discovery(self.etcd)
        left = await asyncio.to_thread(self.etcd.keys)
        for key in left:
            await asyncio.to_thread(self.etcd.delete, key)
        assert all(lease == 0 for lease in left.values()), "what was registered is gone; only what was planted is left"
        assert await asyncio.to_thread(self.etcd.leases) == []

    async def plant(self, key: RecordKey, data: bytes) -> None:
        await asyncio.to_thread(self.etcd.put, str(key), data)


async def test_keys_and_leases_are_those_of_the_reference(etcd: EtcdServer) -> None:
    async with discovery(etcd) as worker:
        id = worker.instance_id
        assert 0 < id < 2**63
        await worker.register(endpoint_record(id))
        await worker.register(model_record(id, "m", lora="a_b"))
        await worker.register(channel_record(5, "kv_metrics"))
        assert await asyncio.to_thread(etcd.keys) == {
            f"v1/instances/demo/backend/generate/{id:x}": id,
            f"v1/mdc/demo/backend/generate/{id:x}/a_b": id,
            "v1/event_channels/demo//kv_metrics/5": id,
        }
        assert await asyncio.to_thread(etcd.leases) == [id]
    assert await asyncio.to_thread(etcd.keys) == {}
    assert await asyncio.to_thread(etcd.leases) == []


async def test_a_key_without_a_lease_of_ours_is_somebody_elses(etcd: EtcdServer) -> None:
    record = endpoint_record(7)
    await asyncio.to_thread(etcd.put, str(record.key), encode_record(record))
    try:
        async with discovery(etcd) as worker:
            with pytest.raises(UsageError, match="another owner"):
                await worker.register(record)
            assert await worker.unregister(record.key) is False
        assert await asyncio.to_thread(etcd.keys) == {str(record.key): 0}
    finally:
        await asyncio.to_thread(etcd.delete, str(record.key))


async def test_more_records_than_a_page_has(etcd: EtcdServer) -> None:
    records = [endpoint_record(n, f"demo.backend{n % 7}.generate") for n in range(2300)]
    async with discovery(etcd) as worker, discovery(etcd) as client:
        await asyncio.gather(*map(worker.register, records))
        found = await client.list(ENDPOINTS)
        assert len(found) == 2300
        assert {record.key for record in found} == {record.key for record in records}


async def test_last_seen_is_when_the_lease_was_renewed(etcd: EtcdServer) -> None:
    async with discovery(etcd, lease_ttl=30) as worker, discovery(etcd) as client:
        await worker.register(endpoint_record(1))
        registered = time.time()
        await asyncio.sleep(2.5)
        (seen,) = (await client.last_seen(ENDPOINTS)).values()
        assert abs(seen - registered) < 1.6


async def test_what_other_buckets_hold_is_not_followed(etcd: EtcdServer) -> None:
    async with discovery(etcd) as worker, discovery(etcd) as client:
        async with client.watch(ENDPOINTS) as watch:
            assert await anext(watch) == []
            await worker.register(model_record(1, "m"))
            await worker.register(channel_record(1, "kv_metrics"))
            await worker.register(endpoint_record(1))
            await until(watch, lambda: len(watch.current) == 1)
        assert len(await client.list(Query(ModelRecord.bucket))) == 1
        assert len(await client.list(Query(EventChannelRecord.bucket))) == 1


@pytest.mark.parametrize("name", ["a/b", "\udcff"])
async def test_names_that_cannot_be_keys_are_refused(etcd: EtcdServer, name: str) -> None:
    record = EndpointRecord(
        namespace=name, component="c", endpoint="e", instance_id=1, transport=Transport(tcp="192.0.2.1:1/a/b")
    )
    async with discovery(etcd) as worker:
        with pytest.raises(UsageError, match="names"):
            await worker.register(record)
        assert dict(worker.owned()) == {}


def test_the_client_is_imported_when_it_is_needed() -> None:
    code = "import sys, stator.discovery.etcd; sys.exit('aiohttp' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path.cwd()).returncode == 0
