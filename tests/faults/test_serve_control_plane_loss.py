"""A whole service (`stator serve`) whose etcd goes, comes back empty, forgets every lease and freezes: HTTP clients notice nothing."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from stator.tasks import Scope
from stator.testing.etcd_server import EtcdServer, etcd_server
from stator.testing.serve_process import StatorProcess, wait_gone

pytestmark = pytest.mark.timeout(120)

TTL = 2
OUTAGE = 3.0
RATE = 15
TEXT = " ".join(f"word{n}" for n in range(40))
ENVIRONMENT = {
    "STATOR_ETCD_LEASE_TTL": str(TTL),
    "STATOR_ETCD_REQUEST_TIMEOUT": "0.5",
    "STATOR_ETCD_ANSWER_TIMEOUT": "1",
    "STATOR_ETCD_RECONNECT_MOST": "0.3",
}


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path) as server:
        yield server


class Clients:
    """They ask for streamed completions, so many every second, and look at the whole answer."""

    def __init__(self, url: str) -> None:
        self.done = 0
        self.failures: list[str] = []
        self._url = url
        self._stopping = asyncio.Event()

    @asynccontextmanager
    async def asking(self) -> AsyncIterator["Clients"]:
        async with (
            aiohttp.ClientSession(self._url, timeout=aiohttp.ClientTimeout(total=30)) as session,
            Scope("clients") as scope,
        ):
            pace = scope.spawn(self._pace(scope, session), name="pace")
            yield self
            self._stopping.set()
            await pace
            async with asyncio.timeout(30):
                await scope.join()

    async def _pace(self, scope: Scope, session: aiohttp.ClientSession) -> None:
        while not self._stopping.is_set():
            scope.spawn(self._ask(session), name="request")
            await asyncio.sleep(1 / RATE)

    async def _ask(self, session: aiohttp.ClientSession) -> None:
        try:
            text = await self._answer(session)
            if text != TEXT:
                self.failures.append(f"a wrong answer: {text!r}")
        except Exception as error:  # whatever a client sees
            self.failures.append(f"{type(error).__name__}: {error}")
        self.done += 1

    async def _answer(self, session: aiohttp.ClientSession) -> str:
        parts: list[str] = []
        body = {"model": "echo", "prompt": TEXT, "stream": True, "max_tokens": 1000}
        async with session.post("/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                    parts += [choice["text"] for choice in json.loads(line[6:])["choices"]]
        return "".join(parts)


async def listed(etcd: EtcdServer, kind: str) -> int:
    return sum(key.startswith(f"v1/{kind}/dynamo/backend/generate/") for key in await asyncio.to_thread(etcd.keys))


async def whole(etcd: EtcdServer, workers: int) -> float:
    """Wait until instances and model cards are all listed; how long that took."""
    began = time.monotonic()
    while (await listed(etcd, "instances"), await listed(etcd, "mdc")) != (workers, workers):
        assert time.monotonic() - began < 2 * TTL, await asyncio.to_thread(etcd.keys)
        await asyncio.sleep(0.05)
    return time.monotonic() - began


async def test_http_clients_notice_nothing(etcd: EtcdServer) -> None:
    arguments = ["--discovery", f"etcd://127.0.0.1:{etcd.client_port}", "--workers", "2", "--port", "0", "-o", "delay=0.005"]
    with StatorProcess("serve", *arguments, environment=ENVIRONMENT) as service:
        url = await asyncio.to_thread(lambda: service.wait_until_ready(workers=2))
        children = await asyncio.to_thread(service.children)
        async with Clients(url).asking() as clients:
            await asyncio.sleep(1.0)
            for empty in (False, True):
                await asyncio.to_thread(etcd.kill)
                await asyncio.sleep(OUTAGE)
                if empty:
                    await asyncio.to_thread(etcd.wipe)
                await asyncio.to_thread(etcd.start)
                await whole(etcd, 2)
            assert len(await asyncio.to_thread(etcd.revoke_all)) >= 2
            await whole(etcd, 2)
            standing = etcd.standing_still()
            await asyncio.to_thread(standing.__enter__)
            try:
                await asyncio.sleep(OUTAGE)
            finally:
                standing.__exit__(None, None, None)
            await asyncio.sleep(TTL + 0.5)
            await whole(etcd, 2)
        assert clients.failures == []
        assert clients.done > RATE * 3 * OUTAGE
        assert await asyncio.to_thread(service.children) == children, "nobody was started again"
        service.send(signal.SIGTERM)
        assert await asyncio.to_thread(service.wait, 30) == 0
        assert await asyncio.to_thread(wait_gone, children) == []
    assert await asyncio.to_thread(etcd.keys) == {}
