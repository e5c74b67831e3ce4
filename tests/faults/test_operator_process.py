"""A live worker process as its operator sees it: the status server's pages, drain and resume, sleep and wake, a blocked loop."""

import asyncio
import re
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientSession, ClientTimeout

from faults.worker_processes import Load, Site, WorkerProcess, site
from stator.errors import Unavailable
from stator.protocol.records import EndpointRecord, Query
from stator.runtime import Runtime
from stator.testing.cluster import ENDPOINT
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)

PLANES = ("native", "compatible")
WHO = {"do": "who"}


class Http:
    """Requests to the status server of a process."""

    def __init__(self, session: ClientSession, url: str) -> None:
        self._session = session
        self.url = url

    async def __call__(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        async with self._session.request(method, self.url + path, data=body) as answer:
            assert answer.status == 405 or answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            return answer.status, await answer.read()

    async def said(self, method: str, path: str, body: bytes = b"", *, status: int = 200) -> Any:
        """The JSON body of an answer with that status."""
        got, text = await self(method, path, body)
        assert got == status, text
        return msgspec.json.decode(text)

    async def metric(self, name: str) -> float:
        """The series of a metric, added up."""
        page = (await self("GET", "/metrics"))[1].decode()
        return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if re.match(rf"{name}(\{{|\s)", line))


@asynccontextmanager
async def operated(worker: WorkerProcess) -> AsyncIterator[Http]:
    async with ClientSession(timeout=ClientTimeout(total=20)) as session:
        yield Http(session, worker.status)


async def operable(here: Site, **settings: Any) -> WorkerProcess:
    return await here.worker(health__port=0, **settings)


@pytest.mark.parametrize("plane", PLANES)
async def test_the_pages_of_a_live_process(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        worker = await operable(here)
        async with operated(worker) as http:
            for path in ("/health", "/live"):
                page = await http.said("GET", path, status=503)
                assert list(page) == ["status", "uptime", "endpoints"]
                assert (page["status"], page["endpoints"]) == ("notready", {"generate": "ready"})
                assert set(page["uptime"]) == {"secs", "nanos"}
                assert 0 <= page["uptime"]["nanos"] < 10**9
            assert await here.client.generate(WHO).collect() == [worker.id]
            assert await http.metric("dynamo_component_requests_total") == 1
            assert await http.metric("dynamo_component_uptime_seconds") > 0
            assert await http("GET", "/metadata") == (404, b"Discovery metadata not available")
            assert await http("GET", "/nothing") == (404, b"Route not found")
            assert (await http("POST", "/health"))[0] == 405
            assert (await http("GET", "/drain"))[0] == 405
            assert await http.said("POST", "/engine/sick", b'{"why":1}') == {"sick": True, "told": {"why": 1}}
            assert await http.said("GET", "/engine/control/recover") == {"sick": False, "told": {}}
            wrong = await http.said("POST", "/engine/sick", b"{nope", status=400)
            assert wrong["error"] == "Invalid JSON"
            assert await http.said("POST", "/engine/fail", status=500) == {
                "error": "Handler error",
                "message": "Python callback failed: ValueError: nope",
            }
            assert await http.said("POST", "/engine/sick/", status=404) == {
                "error": "Route not found",
                "message": "Route /engine/sick/ not found",
            }


async def test_the_first_answered_canary_makes_a_process_ready(tmp_path: Path) -> None:
    settings = {"canary": True, "health__canary": True, "health__canary_wait": 0.3, "health__canary_timeout": 0.3}
    async with site("native", tmp_path) as here:
        worker = await operable(here, **settings)
        async with operated(worker) as http:

            async def becomes(status: int) -> None:
                async with asyncio.timeout(10):
                    while (await http("GET", "/health"))[0] != status:
                        await asyncio.sleep(0.02)

            await becomes(200)
            await http.said("POST", "/engine/sick")
            await becomes(503)
            await eventually(lambda: not here.client.instance_ids(), within=10, what="it is withdrawn")
            await http.said("POST", "/engine/control/recover")
            await becomes(200)
            await eventually(lambda: here.client.instance_ids() == [worker.id], within=10, what="it is back")
            assert await here.client.generate(WHO).collect() == [worker.id]
            worker.send(signal.SIGTERM)
            assert await worker.gone(within=10) == 0


@pytest.mark.parametrize("plane", PLANES)
async def test_drain_and_resume(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        worker, other = await operable(here), await here.worker()
        async with operated(worker) as http:
            listed = await here.runtime.discovery.list(Query(EndpointRecord.bucket))
            (record,) = [each for each in listed if isinstance(each, EndpointRecord) and each.instance_id == worker.id]
            async with here.client.direct({"do": "numbers", "n": 60, "pause": 0.02}, worker.id) as stream:
                assert await anext(stream) == 0
                load = Load(here.client, WHO, None)
                async with asyncio.TaskGroup() as group:
                    with load.by(4, group):
                        assert await http.said("POST", "/drain") in ({"status": "draining", "inflight": n} for n in range(1, 6))
                        await eventually(lambda: here.client.instance_ids() == [other.id], what="it left discovery")
                        assert (await http.said("POST", "/drain"))["status"] == "draining"
                assert load.failures == []
                async with Runtime.connect(discovery="file", file__root=str(tmp_path / "stale"), plane=plane) as stale:
                    await stale.discovery.register(record)  # somebody who has not heard of it
                    client = await stale.endpoint(ENDPOINT).client()
                    await client.wait_for_instances(timeout=5)
                    with pytest.raises(Unavailable, match="is draining") as caught:
                        await client.generate(WHO).collect()
                assert caught.value.retryable
                assert await stream.collect() == list(range(1, 60))
            assert worker.process.returncode is None
            assert await http.said("POST", "/resume") == {"status": "serving"}
            await eventually(lambda: set(here.client.instance_ids()) == {worker.id, other.id}, what="it is back")
            assert await here.client.direct(WHO, worker.id).collect() == [worker.id]


@pytest.mark.parametrize("plane", PLANES)
async def test_sleep_and_wake(plane: str, tmp_path: Path) -> None:
    """Out of discovery, and serving: who knows it is still answered."""
    async with site(plane, tmp_path) as here:
        worker, other = await operable(here), await here.worker()
        async with operated(worker) as http:
            async with here.client.direct({"do": "numbers", "n": 50, "pause": 0.02}, worker.id) as stream:
                assert await anext(stream) == 0
                for _ in range(2):  # again is no error
                    assert await http.said("POST", "/engine/sleep") == {"listed": False}
                await eventually(lambda: here.client.instance_ids() == [other.id], what="it left discovery")
                assert {(await here.client.generate(WHO).collect())[0] for _ in range(6)} == {other.id}
                before = (await http.said("GET", "/health", status=503))["endpoints"]
                assert before == {"generate": "ready"}
                assert await stream.collect() == list(range(1, 50))
            for _ in range(2):
                assert await http.said("POST", "/engine/wake") == {"listed": True}
            await eventually(lambda: set(here.client.instance_ids()) == {worker.id, other.id}, what="it is back")
            assert await here.client.direct(WHO, worker.id).collect() == [worker.id]


@pytest.mark.parametrize("plane", PLANES)
async def test_a_drained_process_sleeps_and_wakes_only_when_it_is_resumed(plane: str, tmp_path: Path) -> None:
    async with site(plane, tmp_path) as here:
        worker = await operable(here)
        async with operated(worker) as http:
            await http.said("POST", "/drain")
            assert await http.said("POST", "/engine/sleep") == {"listed": False}
            assert await http.said("POST", "/engine/wake") == {"listed": False}
            await http.said("POST", "/resume")
            await eventually(lambda: here.client.instance_ids() == [worker.id], what="it is back")


@pytest.mark.parametrize("plane", PLANES)
async def test_a_resume_does_not_hold_up_the_end(plane: str, tmp_path: Path) -> None:
    """After SIGTERM nothing brings a process back; it answers its operator until running requests are done."""
    async with site(plane, tmp_path) as here:
        leaving, staying = await operable(here), await here.worker()
        async with (
            operated(leaving) as http,
            here.client.direct({"do": "numbers", "n": 60, "pause": 0.02}, leaving.id) as stream,
        ):
            assert await anext(stream) == 0
            leaving.send(signal.SIGTERM)
            await eventually(lambda: here.client.instance_ids() == [staying.id], what="its record is gone")
            refusal = await http.said("POST", "/resume", status=500)
            assert "shutting down" in refusal["message"]
            assert await http.said("POST", "/engine/wake", status=500)
            assert not await asyncio.to_thread(here.recorded, leaving)
            assert await stream.collect() == list(range(1, 60))
        assert await leaving.gone(within=5) == 0


@pytest.mark.load
async def test_a_blocked_loop_is_on_its_page(tmp_path: Path) -> None:
    await _blocked(tmp_path, 1.5)


@pytest.mark.soak
async def test_a_loop_blocked_for_long_is_on_its_page(tmp_path: Path) -> None:
    await _blocked(tmp_path, 10.0)


async def _blocked(root: Path, seconds: float) -> None:
    async with site("native", root) as here:
        worker = await operable(here)
        async with operated(worker) as http:

            async def slow() -> float:
                """Delays of more than a second."""
                page = (await http("GET", "/metrics"))[1].decode()
                found = dict(re.findall(r'stator_event_loop_delay_seconds_bucket\{.*le="([^"]+)"\} (\d+)', page))
                return float(found["+Inf"]) - float(found["1"])

            assert await slow() == 0
            before = await http.metric("stator_event_loop_delay_seconds_sum")
            assert await here.client.generate({"do": "block", "seconds": seconds}).collect() == ["blocking", "done"]
            assert await slow() == 1
            late = await http.metric("stator_event_loop_delay_seconds_sum") - before
            assert seconds - 0.1 < late < seconds + 1.0
            assert await http.metric("stator_event_loop_stall_total") >= 1
            assert await here.client.generate(WHO).collect() == [worker.id]
