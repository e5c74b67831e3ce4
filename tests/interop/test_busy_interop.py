"""Our worker's load events at a frontend of the reference: it refuses while our worker says that its cache is full."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import msgspec
import pytest

from interop.peers import REFERENCE, needs_reference
from stator import Runtime
from stator.engines.echo import EchoEngine
from stator.tasks import Scope
from stator.worker import Worker, WorkerConfig
from stator.worker.engine import EngineConfig
from stator.worker.snapshot import ComponentSnapshot, SnapshotSink

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120), needs_reference]

BLOCKS = 1000
CHAT = {"model": "echo", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}


class LoadedEngine(EchoEngine):
    """An echo whose cache is as full as the test says."""

    sink: SnapshotSink

    async def start(self, instance_id: int) -> EngineConfig:
        config = await super().start(instance_id)
        return msgspec.structs.replace(config, total_kv_blocks=BLOCKS, kv_cache_block_size=16, data_parallel_size=2)

    def snapshot_ranks(self) -> Sequence[int]:
        return (0, 1)

    def attach_snapshots(self, sink: SnapshotSink) -> None:
        self.sink = sink

    def use(self, *blocks: int) -> None:
        """Blocks in use, by rank."""
        for rank, used in enumerate(blocks):
            self.sink.publish(
                rank, ComponentSnapshot(kv_used_blocks=used, kv_total_blocks=BLOCKS, gpu_cache_usage=used / BLOCKS)
            )


@asynccontextmanager
async def reference_frontend(root: Path, *arguments: str) -> AsyncIterator[str]:
    """Its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "STATOR_"))},
        "HOME": str(root),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(root / "kv"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        "DYN_LOG": "error",
        "HF_HUB_OFFLINE": "1",
    }
    with (root / "frontend.log").open("wb") as log:
        process = subprocess.Popen(
            [str(REFERENCE), "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port), *arguments],
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                await asyncio.to_thread(process.wait, 10)
            except subprocess.TimeoutExpired:
                process.kill()
                await asyncio.to_thread(process.wait, 10)


@asynccontextmanager
async def our_worker(root: Path) -> AsyncIterator[LoadedEngine]:
    """Serving on the compatible plane, found by file discovery."""
    engine = LoadedEngine()
    async with (
        Runtime.connect(discovery="file", plane="compatible", event_plane="zmq", file__root=str(root / "kv")) as runtime,
        Scope("worker") as scope,
    ):
        worker = Worker(engine, runtime, config=WorkerConfig(namespace="busy", grace_period=0.0))
        running = scope.spawn(worker.run())
        ready = scope.spawn(worker.ready())
        await asyncio.wait((running, ready), timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert ready.done(), "the worker did not start"
        try:
            yield engine
        finally:
            worker.shutdown()
            worker.shutdown()
            await asyncio.wait_for(running, 20)


async def status_becomes(http: aiohttp.ClientSession, wanted: int, *, within: float = 20.0) -> str:
    """Ask until the answer has that status; its body."""
    last = "no answer"
    with suppress(TimeoutError):
        async with asyncio.timeout(within):
            while True:
                with suppress(aiohttp.ClientConnectionError):
                    async with http.post("/v1/chat/completions", json=CHAT) as answer:
                        last = f"{answer.status} {await answer.text()}"
                        if answer.status == wanted:
                            return last
                await asyncio.sleep(0.05)
    raise AssertionError(f"waited {within} s for {wanted}, last: {last}")


async def test_the_reference_refuses_while_all_ranks_of_our_worker_are_over_the_limit(tmp_path: Path) -> None:
    async with (
        our_worker(tmp_path) as engine,
        reference_frontend(tmp_path, "--active-decode-blocks-threshold", "0.5") as url,
        aiohttp.ClientSession(url) as http,
    ):
        await status_becomes(http, 200, within=40)
        engine.use(501, 501)
        assert "overloaded" in await status_becomes(http, 529)
        engine.use(501, 500)  # one rank at the limit, not over it
        await status_becomes(http, 200)
        engine.use(501, 999)
        await status_becomes(http, 529)
        engine.use(0, 0)
        await status_becomes(http, 200)


async def test_a_frontend_that_comes_later_learns_of_a_load_that_does_not_change(tmp_path: Path) -> None:
    async with our_worker(tmp_path) as engine:
        engine.use(900, 900)
        async with (
            reference_frontend(tmp_path, "--active-decode-blocks-threshold", "0.5") as url,
            aiohttp.ClientSession(url) as http,
        ):
            await status_becomes(http, 529, within=40)
            engine.use(100, 900)
            await status_becomes(http, 200)
