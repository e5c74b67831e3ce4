"""A directory shared with processes of the reference 1.3.1: each side sees the other's instances come, stay and go.

The reference's time to live is long and cannot be set, so the scenarios wait at the same time, each in a directory of its own.
"""

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from random import Random

import pytest
import pytest_asyncio

from interop.peers import HERE, REFERENCE, ROOT, needs_reference
from interop.watching import at_once, come_stay_and_go, process, shown, watcher
from stator.discovery import FileDiscovery, FileDiscoveryConfig, open_file
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, Query
from stator.tasks import SystemClock
from stator.testing.discovery_suite import silence, until

OWNER = ROOT / "tests" / "faults" / "discovery_owner.py"
TTL = 10.0
"""the reference's"""
ENDPOINT = "demo.backend.generate"

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]


def shared(root: Path) -> dict[str, str]:
    """What a process of the reference is told."""
    return {"DYN_DISCOVERY_BACKEND": "file", "DYN_FILE_KV": str(root)}


def discovery(root: Path) -> FileDiscovery:
    return open_file(FileDiscoveryConfig(root=str(root)), clock=SystemClock(), random=Random())


async def a_reference_worker_comes_and_is_gone_when_killed(root: Path) -> None:
    query = Query(EndpointRecord.bucket, ("demo", "backend", "generate"))
    async with discovery(root) as ours, ours.watch(query) as watch:
        async with process(shared(root), str(REFERENCE), str(HERE / "peer_raiser.py")) as worker:
            await until(watch, lambda: len(watch.current) == 1, within=40)
            (record,) = watch.current.values()
            assert isinstance(record, EndpointRecord)
            address, path = (record.transport.tcp or "").split("/", 1)
            assert path == endpoint_path(record.instance_id, "generate")
            assert int(address.rsplit(":", 1)[1]) > 0
            assert record.device_type in ("cpu", "cuda")
            assert await ours.list(query) == [record]
            await silence(watch, TTL + 2)  # its signs of life are understood
            worker.send_signal(signal.SIGKILL)
            killed = time.monotonic()
            await until(watch, lambda: not watch.current, within=TTL + 2)
            assert time.monotonic() - killed > TTL / 2
        files = await asyncio.to_thread(lambda: list((root / EndpointRecord.bucket).iterdir()))
        assert files == []


async def a_reference_client_sees_our_instances(root: Path) -> None:
    await come_stay_and_go(shared(root), ENDPOINT, discovery(root), longer=TTL + 5)


async def our_stopped_worker_comes_back_to_a_reference_client(root: Path) -> None:
    """The reference removes the file of a worker that was stopped for too long; ours writes it again."""
    async with (
        watcher(shared(root), ENDPOINT) as client,
        process({}, sys.executable, str(OWNER), str(root), str(TTL), "7", "serve") as worker,
    ):
        await shown(client, {7}, within=40)
        worker.send_signal(signal.SIGSTOP)
        assert await shown(client, set(), within=TTL + 6) > TTL / 2
        worker.send_signal(signal.SIGCONT)
        assert await shown(client, {7}, within=5) < 2


SCENARIOS = {
    each.__name__: each
    for each in (
        a_reference_worker_comes_and_is_gone_when_killed,
        a_reference_client_sees_our_instances,
        our_stopped_worker_comes_back_to_a_reference_client,
    )
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def begun(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Mapping[str, "asyncio.Task[None]"]]:
    roots = {name: tmp_path_factory.mktemp(name) for name in SCENARIOS}
    async with at_once({name: scenario(roots[name]) for name, scenario in SCENARIOS.items()}) as tasks:
        yield tasks


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_each_side_sees_the_other(begun: Mapping[str, "asyncio.Task[None]"], scenario: str) -> None:
    await begun[scenario]
