"""One etcd shared with processes of the reference 1.3.1, requests over TCP: each side sees and calls the other."""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio

from interop.exchanges import Exchanges, Place, count, killed_in_mid_stream
from interop.peers import HERE, REFERENCE, Peer, needs_reference
from interop.watching import at_once, come_stay_and_go, process, shown, watcher
from stator.discovery.etcd import EtcdConfig, EtcdDiscovery, open_etcd
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, Query
from stator.runtime.plugins import load_plugin
from stator.tasks import SystemClock
from stator.testing.discovery_suite import silence, until
from stator.testing.etcd_server import EtcdServer, etcd_server

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

TTL = 4
OWNER = """
import asyncio, sys
from random import Random
from stator.discovery.etcd import EtcdConfig, open_etcd
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record
async def main(url, ttl, endpoint):
    async with open_etcd(EtcdConfig(endpoints=(url,), lease_ttl=int(ttl)), clock=SystemClock(), random=Random()) as discovery:
        await discovery.register(endpoint_record(discovery.instance_id, endpoint))
        print(discovery.instance_id, flush=True)
        await asyncio.sleep(600)
asyncio.run(main(*sys.argv[1:]))
"""


class TestEtcd(Exchanges):
    over_etcd = True

    async def test_it_is_killed_in_mid_stream(self, tmp_path: Path) -> None:
        with etcd_server(tmp_path) as own:
            await killed_in_mid_stream(Place(root=tmp_path, python=self.reference, nats=None, etcd=own))

    async def test_our_lease_is_revoked_and_its_client_goes_on(self, place: Place, client: Peer) -> None:
        etcd = place.etcd
        assert etcd is not None
        async with place.working(count, etcd__lease_ttl=TTL) as ours:
            (key,) = await asyncio.to_thread(etcd.keys, f"v1/instances/{ours.endpoint.replace('.', '/')}/")
            before = await client.ask(endpoint=ours.endpoint, request={"n": 1})
            assert before["error"] is None
            lease = (await asyncio.to_thread(etcd.keys))[key]
            await asyncio.to_thread(etcd.ask, "/v3/lease/revoke", {"ID": str(lease)})
            deadline = time.monotonic() + TTL
            while (await asyncio.to_thread(etcd.keys)).get(key) in (None, lease):
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)
            answer = await client.ask(endpoint=ours.endpoint, request={"n": 2})
            assert answer["error"] is None
            assert len(answer["items"]) == 2


# What waits for leases to expire; all at the same time, each at an endpoint of its own.


def shared(etcd: EtcdServer, **more: str) -> dict[str, str]:
    """What a process of the reference is told."""
    return {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd.url, "ETCD_LEASE_TTL": str(TTL), **more}


def discovery(etcd: EtcdServer) -> EtcdDiscovery:
    return open_etcd(EtcdConfig(endpoints=(etcd.url,), lease_ttl=TTL), clock=SystemClock(), random=Random())


async def its_records_are_ours(etcd: EtcdServer) -> None:
    query = Query(EndpointRecord.bucket, ("demo", "backend", "kept"))
    async with (
        process(shared(etcd, PEER_ENDPOINT="kept"), str(REFERENCE), str(HERE / "peer_raiser.py")),
        discovery(etcd) as ours,
        ours.watch(query) as watch,
    ):
        await until(watch, lambda: len(watch.current) == 1, within=30)
        (record,) = watch.current.values()
        assert isinstance(record, EndpointRecord)
        assert (await asyncio.to_thread(etcd.keys))[str(record.key)] == record.instance_id, "its lease is its id"
        assert (record.transport.tcp or "").endswith(endpoint_path(record.instance_id, "kept"))
        await silence(watch, TTL + 1)
        (seen,) = (await ours.last_seen(query)).values()
        assert abs(time.time() - seen) < TTL


async def its_worker_dies(etcd: EtcdServer) -> None:
    query = Query(EndpointRecord.bucket, ("demo", "backend", "doomed"))
    async with (
        process(shared(etcd, PEER_ENDPOINT="doomed"), str(REFERENCE), str(HERE / "peer_raiser.py")) as doomed,
        discovery(etcd) as ours,
        ours.watch(query) as watch,
    ):
        await until(watch, lambda: len(watch.current) == 1, within=30)
        doomed.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        await until(watch, lambda: not watch.current, within=3 * TTL)
        assert time.monotonic() - killed < TTL + 1.5


async def its_client_sees_our_instances_come_stay_and_go(etcd: EtcdServer) -> None:
    await come_stay_and_go(shared(etcd), "demo.backend.watched", discovery(etcd), longer=TTL + 2)


async def its_client_sees_our_worker_die(etcd: EtcdServer) -> None:
    endpoint = "demo.backend.ours"
    async with (
        watcher(shared(etcd), endpoint) as client,
        process({}, sys.executable, "-c", OWNER, etcd.url, str(TTL), endpoint) as worker,
    ):
        assert worker.stdout is not None
        async with asyncio.timeout(20):
            id = int(await worker.stdout.readline())
        await shown(client, {id}, within=40)
        worker.send_signal(signal.SIGKILL)
        assert await shown(client, set(), within=3 * TTL) < TTL + 1.5


SCENARIOS = {
    each.__name__: each
    for each in (
        its_records_are_ours,
        its_worker_dies,
        its_client_sees_our_instances_come_stay_and_go,
        its_client_sees_our_worker_die,
    )
}


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    load_plugin("stator.discovery", "etcd")
    with etcd_server(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def begun(etcd: EtcdServer) -> AsyncIterator[Mapping[str, "asyncio.Task[None]"]]:
    async with at_once({name: scenario(etcd) for name, scenario in SCENARIOS.items()}) as tasks:
        yield tasks


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_each_side_sees_the_other(begun: Mapping[str, "asyncio.Task[None]"], scenario: str) -> None:
    await begun[scenario]
