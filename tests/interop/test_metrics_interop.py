"""A worker of the reference is called and scraped; the same requests, counted by hand, must give the same page."""

import asyncio
import json
import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from interop.peers import Peer, discovery_root, needs_reference, peer, records_in
from stator.errors import StatorError
from stator.runtime import Runtime
from stator.telemetry import MetricsLevel, WorkerProcessMetrics, WorkError, WorkHandlerMetrics

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

ENDPOINTS = ("generate", "broken")
FOREIGN = ("dynamo_tokio_",)
"""families of the reference's executor, which we do not have"""
MEASURED = ("_sum", "uptime_seconds", "_bucket", "_cancellation_total")
"""samples that depend on the clock: their presence is compared, not their value. The reference takes a caller that closes its
stream at the end for one that cancels, whenever it sees that before it has noted the end itself: about one request in a hundred,
with its own client too."""

Family = tuple[str, str, str, list[tuple[str, dict[str, str]]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


@pytest.fixture(scope="module")
def port() -> int:
    """A free one: the reference reads it as a signed 16-bit number, so those that the system would choose are too high."""
    for port in range(20_000 + os.getpid() % 10_000, 32_767):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def worker(root: Path, port: int) -> Iterator[Peer]:
    with peer("peer_worker.py", root, DYN_SYSTEM_PORT=str(port)) as process:
        yield process


async def scrape(port: int) -> str:
    """The reference's page, without its executor's families."""

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return answer.read().decode()

    page = await asyncio.to_thread(read)
    return "".join(line for line in page.splitlines(keepends=True) if not any(name in line for name in FOREIGN))


async def scrape_after(port: int, endpoints: tuple[str, ...]) -> str:
    """The page, once each of `endpoints` has ended one request: the reference notes the duration last."""
    deadline = asyncio.get_running_loop().time() + 10
    while True:
        page = await scrape(port)
        if all(value_of(page, "dynamo_component_request_duration_seconds_count", name) == 1 for name in endpoints):
            return page
        assert asyncio.get_running_loop().time() < deadline, page
        await asyncio.sleep(0.05)


def families(page: str) -> list[Family]:
    """Name, type, help, and names and labels of all samples in their order: everything but the numbers."""
    return [
        (family.name, family.type, family.documentation, [(sample.name, sample.labels) for sample in family.samples])
        for family in text_string_to_metric_families(page)
    ]


def counts(page: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """The numbers that do not depend on the clock."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
        if not sample.name.endswith(MEASURED)
    }


def order(page: str) -> list[str]:
    """What stands before the number in each line, in the order of the page, `HELP` and `TYPE` included."""
    return [line if line.startswith("#") else line.rpartition(" ")[0] for line in page.splitlines()]


class Counted:
    """The page of a worker like the reference's, counted by hand."""

    def __init__(self, worker_id: int) -> None:
        self.root = MetricsLevel.runtime(worker_id=worker_id)
        component = self.root.namespace("demo").component("backend")
        self.handlers = {name: WorkHandlerMetrics(component.endpoint(name)) for name in ENDPOINTS}
        self.process = WorkerProcessMetrics(self.root)
        self.process.admits()
        self.root.create_gauge("uptime_seconds", "Total uptime of the DistributedRuntime in seconds").set(1.5)

    def page(self) -> str:
        return self.root.exposition().decode()


def value_of(page: str, name: str, endpoint: str) -> float:
    return next(
        value for (found, labels), value in counts(page).items() if found == name and ("dynamo_endpoint", endpoint) in labels
    )


async def wait_for_worker(root: Path) -> int:
    """The instance id, once both endpoints are registered."""
    deadline = asyncio.get_running_loop().time() + 30
    while len(found := await asyncio.to_thread(records_in, root)) < len(ENDPOINTS):
        assert asyncio.get_running_loop().time() < deadline, "the worker did not register"
        await asyncio.sleep(0.05)
    return found[0].instance_id


async def call(runtime: Runtime, endpoint: str, request: Any) -> list[Any]:
    client = await runtime.endpoint(f"demo.backend.{endpoint}").client()
    await client.wait_for_instances()
    return await client.generate(request).collect()


async def test_the_same_requests_give_the_same_page(root: Path, port: int, worker: Peer) -> None:
    mine = Counted(await wait_for_worker(root))
    theirs = await scrape(port)
    assert order(mine.page()) == order(theirs)
    assert counts(mine.page()) == counts(theirs)

    async with Runtime.connect(plane="compatible", discovery="file", file__root=str(root)) as runtime:
        items = await call(runtime, "generate", {"mode": "count", "n": 3})
        with pytest.raises(StatorError):
            await call(runtime, "broken", {"mode": "count", "n": 3})
    theirs = await scrape_after(port, ENDPOINTS)

    frames = [{"data": {"data": item}, "complete_final": False} for item in items] + [{"complete_final": True}]
    handler = mine.handlers["generate"]
    handler.received(int(value_of(theirs, "dynamo_component_request_bytes_total", "generate")))
    with handler.inflight:
        mine.process.first_response((0.001,))
        handler.responded(sum(len(json.dumps(frame, separators=(",", ":"))) for frame in frames))
    handler.finished((0.001,))
    handler = mine.handlers["broken"]
    handler.received(int(value_of(theirs, "dynamo_component_request_bytes_total", "broken")))
    handler.failed(WorkError.GENERATE)
    handler.finished((0.001,))
    for _ in range(2):
        mine.process.arrived(sent_ns=1, received_ns=2)

    assert families(mine.page()) == families(theirs)
    assert order(mine.page()) == order(theirs)
    assert counts(mine.page()) == counts(theirs)
    assert value_of(theirs, "dynamo_component_request_bytes_total", "generate") > 0
