"""One etcd shared with processes of the reference 1.3.1, requests over TCP: each side sees and calls the other."""

import asyncio
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from interop.peers import REFERENCE, Peer, discovery_root, needs_reference, peer
from stator.discovery.etcd import EtcdConfig, EtcdDiscovery, open_etcd
from stator.errors import EngineError, StatorError, StreamIncomplete
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, Query
from stator.runtime import Client, Context, Runtime
from stator.runtime.plugins import load_plugin
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record, silence, until
from stator.testing.etcd_server import EtcdServer, etcd_server
from stator.testing.plane_suite import eventually

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

GENERATE = Query(EndpointRecord.bucket, ("demo", "backend", "generate"))
TTL = 4
_numbers = itertools.count(1)

WATCHER = """
import asyncio, json, sys, uvloop
from dynamo.runtime import dynamo_worker
@dynamo_worker()
async def main(runtime):
    client = await runtime.endpoint("demo.backend.watched").client()
    shown = None
    while True:
        ids = sorted(client.instance_ids())
        if ids != shown:
            print(json.dumps(ids), flush=True)
            shown = ids
        await asyncio.sleep(0.02)
uvloop.install(); asyncio.run(main())
"""
OWNER = """
import asyncio, sys
from random import Random
from stator.discovery.etcd import EtcdConfig, open_etcd
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record
async def main(url, ttl):
    async with open_etcd(EtcdConfig(endpoints=(url,), lease_ttl=int(ttl)), clock=SystemClock(), random=Random()) as discovery:
        await discovery.register(endpoint_record(discovery.instance_id, "demo.backend.watched"))
        print(discovery.instance_id, flush=True)
        await asyncio.sleep(600)
asyncio.run(main(*sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    load_plugin("stator.discovery", "etcd")
    with etcd_server(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


def shared(etcd: EtcdServer) -> dict[str, str]:
    """What the reference is told."""
    return {"DYN_DISCOVERY_BACKEND": "etcd", "ETCD_ENDPOINTS": etcd.url, "ETCD_LEASE_TTL": str(TTL)}


@pytest.fixture(scope="module")
def worker(etcd: EtcdServer, root: Path) -> Iterator[Peer]:
    with peer("peer_worker.py", root, **shared(etcd)) as process:
        wait_for_records(etcd, "v1/instances/demo/backend/generate/", 1)
        yield process


@pytest.fixture(scope="module")
def client(etcd: EtcdServer, root: Path) -> Iterator[Peer]:
    with peer("peer_client.py", root, **shared(etcd)) as process:
        yield process


def wait_for_records(etcd: EtcdServer, prefix: str, count: int) -> None:
    deadline = time.monotonic() + 30
    while len(etcd.keys(prefix)) < count:
        assert time.monotonic() < deadline, etcd.keys()
        time.sleep(0.05)


def discovery(etcd: EtcdServer) -> EtcdDiscovery:
    return open_etcd(EtcdConfig(endpoints=(etcd.url,), lease_ttl=TTL), clock=SystemClock(), random=Random())


def connected(etcd: EtcdServer) -> Any:
    return Runtime.connect(plane="compatible", discovery="etcd", etcd__endpoints=(etcd.url,), etcd__lease_ttl=TTL)


# Our client, its worker


@asynccontextmanager
async def calling(etcd: EtcdServer, endpoint: str = "demo.backend.generate") -> AsyncIterator[Client]:
    async with connected(etcd) as runtime:
        found = await runtime.endpoint(endpoint).client()
        await found.wait_for_instances()
        yield found


async def test_its_records_are_ours(etcd: EtcdServer, worker: Peer) -> None:
    async with discovery(etcd) as ours, ours.watch(GENERATE) as watch:
        await until(watch, lambda: len(watch.current) == 1)
        (record,) = watch.current.values()
        assert isinstance(record, EndpointRecord)
        assert (await asyncio.to_thread(etcd.keys))[str(record.key)] == record.instance_id, "its lease is its id"
        assert (record.transport.tcp or "").endswith(endpoint_path(record.instance_id, "generate"))
        await silence(watch, TTL + 1)
        (seen,) = (await ours.last_seen(GENERATE)).values()
        assert abs(time.time() - seen) < TTL


@pytest.mark.parametrize("n", [0, 1, 5000])
async def test_items_of_its_worker(etcd: EtcdServer, worker: Peer, n: int) -> None:
    async with calling(etcd) as caller:
        assert await caller.generate({"mode": "count", "n": n}).collect() == [
            {"token_ids": [number], "text": "tok"} for number in range(n)
        ]


async def test_an_error_of_its_worker(etcd: EtcdServer, worker: Peer) -> None:
    async with calling(etcd) as caller:
        with pytest.raises(EngineError, match="ValueError: boom"):
            await caller.generate({"mode": "raise", "n": 2}).collect()


async def journal(caller: Client, id: str) -> dict[str, Any]:
    """What the worker noted at the end of request `id`."""
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        (ended,) = await caller.generate({"mode": "journal", "of": id}).collect()
        if ended:
            return ended[0]
        assert asyncio.get_running_loop().time() < deadline, f"{id} did not end at the worker"
        await asyncio.sleep(0.05)


async def test_its_worker_is_stopped_and_killed(etcd: EtcdServer, worker: Peer) -> None:
    async with calling(etcd) as caller:
        async with caller.generate({"mode": "until stopped"}, id="to stop") as stream:
            assert await anext(stream) == 0
            stream.stop()
            async for _ in stream:
                pass
        noted = await journal(caller, "to stop")
        assert noted["stopped"]
        assert not noted["killed"]
        async with caller.generate({"mode": "hold"}, id="to kill") as stream:
            assert await anext(stream) == 1
        assert (await journal(caller, "to kill"))["killed"]


async def test_its_worker_dies(tmp_path: Path) -> None:
    with etcd_server(tmp_path) as own, peer("peer_worker.py", tmp_path, **shared(own)) as doomed:
        async with discovery(own) as ours, ours.watch(GENERATE) as watch:
            await until(watch, lambda: len(watch.current) == 1, within=30)
            await asyncio.to_thread(doomed.kill)
            killed = time.monotonic()
            await until(watch, lambda: not watch.current, within=3 * TTL)
            assert time.monotonic() - killed < TTL + 1.5


async def test_its_worker_dies_in_mid_stream(tmp_path: Path) -> None:
    with etcd_server(tmp_path) as own, peer("peer_worker.py", tmp_path, **shared(own)) as doomed:
        await asyncio.to_thread(wait_for_records, own, "v1/instances/demo/backend/generate/", 1)
        async with calling(own) as caller:
            stream = caller.generate({"mode": "until stopped"})
            assert await anext(stream) == 0
            await asyncio.to_thread(doomed.kill)
            with pytest.raises(StreamIncomplete):
                async with asyncio.timeout(5):
                    await stream.collect()
            with pytest.raises(StatorError) as caught:
                await caller.generate({"mode": "count", "n": 1}).collect()
            assert caught.value.retryable


# Its client, our worker


class Ended:
    """How requests ended at a worker of ours."""

    def __init__(self) -> None:
        self.how: list[str] = []
        self.stopped: list[bool] = []


@asynccontextmanager
async def working(etcd: EtcdServer, handler: Any) -> AsyncIterator[tuple[str, Ended]]:
    endpoint, ended = f"demo.backend.t{next(_numbers)}x", Ended()

    async def observed(request: Any, context: Context) -> AsyncIterator[Any]:
        how = "complete"
        try:
            async for item in handler(request, context):
                yield item
        except BaseException as error:
            how = type(error).__name__
            raise
        finally:
            ended.how.append(how)
            ended.stopped.append(context.is_stopped)

    async with connected(etcd) as runtime, runtime.endpoint(endpoint).serving(observed) as served:
        yield endpoint, ended
        await eventually(lambda: served.inflight == 0, what="handlers ended")


async def count(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request["n"]):
        yield {"token_ids": [number], "text": "tok"}


async def endless(request: Any, context: Context) -> AsyncIterator[Any]:
    number = 0
    while not context.is_stopped:
        yield number
        number += 1
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("n", [0, 1, 100])
async def test_items_of_our_worker(etcd: EtcdServer, client: Peer, n: int) -> None:
    async with working(etcd, count) as (endpoint, _):
        answer = await client.ask(endpoint=endpoint, request={"n": n})
        assert answer["error"] is None
        assert answer["items"] == [{"token_ids": [number], "text": "tok"} for number in range(n)]


async def test_an_error_of_our_worker(etcd: EtcdServer, client: Peer) -> None:
    async def fails(request: Any, context: Context) -> AsyncIterator[Any]:
        yield 1
        raise ValueError("boom")

    async with working(etcd, fails) as (endpoint, _):
        answer = await client.ask(endpoint=endpoint, request={})
        assert "boom" in answer["error"]


@pytest.mark.parametrize("then", ["stop", "drop"])
async def test_our_worker_is_stopped_and_killed(etcd: EtcdServer, client: Peer, then: str) -> None:
    async with working(etcd, endless) as (endpoint, ended):
        answer = await client.ask(endpoint=endpoint, request={}, take=3, then=then)
        assert answer["error"] is None
        assert answer["items"][:3] == [0, 1, 2]
        await eventually(lambda: len(ended.how) == 1, what="the handler ended")


async def test_our_lease_is_revoked_and_its_client_goes_on(etcd: EtcdServer, client: Peer, tmp_path: Path) -> None:
    async with working(etcd, count) as (endpoint, _):
        key = await asyncio.to_thread(our_key, etcd, endpoint)
        before = await client.ask(endpoint=endpoint, request={"n": 1})
        assert before["error"] is None
        lease = (await asyncio.to_thread(etcd.keys))[key]
        await asyncio.to_thread(etcd.ask, "/v3/lease/revoke", {"ID": str(lease)})
        deadline = time.monotonic() + TTL
        while (await asyncio.to_thread(etcd.keys)).get(key) in (None, lease):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        answer = await client.ask(endpoint=endpoint, request={"n": 2})
        assert answer["error"] is None
        assert len(answer["items"]) == 2


def our_key(etcd: EtcdServer, endpoint: str) -> str:
    (key,) = etcd.keys(f"v1/instances/{endpoint.replace('.', '/')}/")
    return key


async def shown(watcher: asyncio.subprocess.Process, ids: set[int], *, within: float) -> float:
    """Wait until the reference's client knows exactly `ids`; the answer is how long that took."""
    assert watcher.stdout is not None
    began = time.monotonic()
    last = b""
    try:
        async with asyncio.timeout(within):
            while not last or set(json.loads(last)) != ids:
                last = await watcher.stdout.readline()
                assert last, "the reference's client ended"
    except TimeoutError:
        raise AssertionError(f"after {within} s the reference knows {last!r} instead of {ids}") from None
    return time.monotonic() - began


@asynccontextmanager
async def process(etcd: EtcdServer, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child on the same etcd; killed in the end."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "STATOR_"))}
    child = await asyncio.create_subprocess_exec(*command, env={**env, **shared(etcd)}, stdout=asyncio.subprocess.PIPE)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


async def test_its_client_sees_our_instances_come_and_go(etcd: EtcdServer) -> None:
    one, other = endpoint_record(2**64 - 1, "demo.backend.watched"), endpoint_record(7, "demo.backend.watched")
    async with process(etcd, str(REFERENCE), "-c", WATCHER) as watcher:
        async with discovery(etcd) as ours:
            await ours.register(one)
            await shown(watcher, {one.instance_id}, within=40)
            await ours.register(other)
            assert await shown(watcher, {one.instance_id, other.instance_id}, within=5) < 1
            await ours.unregister(one.key)
            assert await shown(watcher, {other.instance_id}, within=5) < 1
            with pytest.raises(AssertionError, match="instead of"):
                await shown(watcher, set(), within=TTL + 2)  # our lease is renewed
        await shown(watcher, set(), within=2)


async def test_its_client_sees_our_worker_die(etcd: EtcdServer) -> None:
    async with (
        process(etcd, str(REFERENCE), "-c", WATCHER) as watcher,
        process(etcd, sys.executable, "-c", OWNER, etcd.url, str(TTL)) as worker,
    ):
        assert worker.stdout is not None
        async with asyncio.timeout(20):
            id = int(await worker.stdout.readline())
        await shown(watcher, {id}, within=40)
        worker.send_signal(signal.SIGKILL)
        assert await shown(watcher, set(), within=3 * TTL) < TTL + 1.5
