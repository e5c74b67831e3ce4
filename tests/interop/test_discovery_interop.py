"""A directory shared with processes of the reference 1.3.1: each side sees the other's instances come, stay and go."""

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import pytest

from interop.peers import REFERENCE, needs_reference
from stator.discovery import FileDiscovery, FileDiscoveryConfig, open_file
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, Query
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record, silence, until

ROOT = Path(__file__).parents[2]
OWNER = ROOT / "tests" / "faults" / "discovery_owner.py"
TTL = 10.0
"""the reference's, which cannot be set"""

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

WORKER = """
import asyncio, uvloop
from dynamo.runtime import dynamo_worker
async def generate(request, context):
    yield request
@dynamo_worker()
async def main(runtime):
    await runtime.endpoint("demo.backend.generate").serve_endpoint(generate)
uvloop.install(); asyncio.run(main())
"""
CLIENT = """
import asyncio, json, uvloop
from dynamo.runtime import dynamo_worker
@dynamo_worker()
async def main(runtime):
    client = await runtime.endpoint("demo.backend.generate").client()
    shown = None
    while True:
        ids = sorted(client.instance_ids())
        if ids != shown:
            print(json.dumps(ids), flush=True)
            shown = ids
        await asyncio.sleep(0.02)
uvloop.install(); asyncio.run(main())
"""


@asynccontextmanager
async def process(root: Path, *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child that shares `root`; killed in the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "STATOR_"))}
    environment |= {
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(root),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
    }
    child = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.wait()


def discovery(root: Path) -> FileDiscovery:
    return open_file(FileDiscoveryConfig(root=str(root)), clock=SystemClock(), random=Random())


async def shown(client: asyncio.subprocess.Process, ids: set[int], *, within: float) -> float:
    """Wait until the reference's client knows exactly `ids`; the answer is how long that took."""
    assert client.stdout is not None
    began = time.monotonic()
    last = b""
    try:
        async with asyncio.timeout(within):
            while not last or set(json.loads(last)) != ids:
                last = await client.stdout.readline()
                assert last, "the reference's client ended"
    except TimeoutError:
        raise AssertionError(f"after {within} s the reference knows {last!r} instead of {ids}") from None
    return time.monotonic() - began


async def test_a_reference_worker_comes_and_is_gone_when_killed(tmp_path: Path) -> None:
    query = Query(EndpointRecord.bucket, ("demo", "backend", "generate"))
    async with discovery(tmp_path) as ours, ours.watch(query) as watch:
        async with process(tmp_path, str(REFERENCE), "-c", WORKER) as worker:
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
        files = await asyncio.to_thread(lambda: list((tmp_path / EndpointRecord.bucket).iterdir()))
        assert files == []


async def test_a_reference_client_sees_our_instances(tmp_path: Path) -> None:
    one, other = endpoint_record(2**64 - 1), endpoint_record(7)
    async with process(tmp_path, str(REFERENCE), "-c", CLIENT) as client:
        async with discovery(tmp_path) as ours:
            await ours.register(one)
            await shown(client, {one.instance_id}, within=40)
            await ours.register(other)
            assert await shown(client, {one.instance_id, other.instance_id}, within=5) < 1
            await ours.unregister(one.key)
            assert await shown(client, {other.instance_id}, within=5) < 1
            with pytest.raises(AssertionError, match="instead of"):
                await shown(client, set(), within=TTL + 5)  # our signs of life are understood
        await shown(client, set(), within=5)


async def test_our_stopped_worker_comes_back_to_a_reference_client(tmp_path: Path) -> None:
    """The reference removes the file of a worker that was stopped for too long; ours writes it again."""
    async with (
        process(tmp_path, str(REFERENCE), "-c", CLIENT) as client,
        process(tmp_path, sys.executable, str(OWNER), str(tmp_path), str(TTL), "7", "serve") as worker,
    ):
        await shown(client, {7}, within=40)
        worker.send_signal(signal.SIGSTOP)
        assert await shown(client, set(), within=TTL + 6) > TTL / 2
        worker.send_signal(signal.SIGCONT)
        assert await shown(client, {7}, within=5) < 2
