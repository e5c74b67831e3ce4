"""Nothing gets lost in the counts: over thousands of requests of every fate, what workers received is what they answered, refused and
saw cancelled, at every level; and every gauge is back at zero.
"""

import asyncio
from collections import Counter
from random import Random
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from interop.raw_caller import raw_caller, two_part
from loopback.test_runtime_conservation import Plan, Workers, carry_out, plans
from stator.errors import StatorError
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.runtime import Client, Runtime
from stator.testing.cluster import SOCKET_PLANES, Cluster, ClusterWorker
from stator.testing.plane_suite import eventually
from stator.transports.inbox import Inbox, Patience, PhaseLimits

pytestmark = pytest.mark.timeout(110)

REQUESTS = 5000
AT_ONCE = 60
BAD = 200
"""requests among them that cannot be read"""
ENDPOINTS = ("test.backend.generate", "test.backend.other", "test.spare.generate2")
OUTCOMES = ("ok", "error", "cancelled", "refused")
CONSTANT = ("_capacity", "_uptime_seconds")
"""gauges that are not of requests"""

Sums = Counter[tuple[str, ...]]


class Page:
    """The samples of an exposition."""

    def __init__(self, text: bytes) -> None:
        self.families = list(text_string_to_metric_families(text.decode()))

    def sum(self, name: str, **labels: str) -> float:
        """Of all samples with that name and these labels."""
        return sum(
            sample.value
            for family in self.families
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def gauges(self) -> dict[str, float]:
        """Those of requests that are not zero."""
        return {
            f"{sample.name}{sample.labels}": sample.value
            for family in self.families
            if family.type == "gauge" and not family.name.endswith(CONSTANT)
            for sample in family.samples
            if sample.value
        }


class Site:
    """Workers with three endpoints each, a client of each endpoint, and somebody who sends what cannot be read."""

    def __init__(self, cluster: Cluster, random: Random) -> None:
        self.cluster = cluster
        self.random = random
        self.handlers = {name: Workers() for name in ENDPOINTS}
        self.members: list[ClusterWorker] = []
        self.clients: dict[str, Client] = {}
        self.caller: Runtime
        self.unreadable = Counter[str]()
        """sent and known to have arrived, by endpoint"""

    async def open(self) -> None:
        for _ in range(3):
            first = await self.cluster.worker(self.handlers[ENDPOINTS[0]], endpoint=ENDPOINTS[0])
            self.members.append(first)
            for name in ENDPOINTS[1:]:
                await self.cluster.worker(self.handlers[name], endpoint=name, runtime=first.runtime)
        self.caller = await self.cluster.join()
        for name in ENDPOINTS:
            self.clients[name] = await self.cluster.client("random", endpoint=name, runtime=self.caller)

    async def send_unreadable(self, name: str) -> None:
        """A value that is no JSON, or on the compatible plane bytes that are no request at all."""
        record = self.random.choice(self.clients[name].instances())
        if record.stator is None and self.random.random() < 0.5:
            await self._send_noise(record, name)
        else:
            await self._send_no_json(record)

    async def _send_noise(self, record: EndpointRecord, name: str) -> None:
        address = record.transport.tcp
        assert address is not None
        payload = self.random.choice(
            [b"", b"\xff" * 50, two_part(b"{", b"1"), two_part(b"", b"{}"), two_part(b'{"id":"x"}', b"1")]
        )
        try:
            async with raw_caller(address) as caller:
                if await caller.send(payload) == b"":
                    self.unreadable[name] += 1
        except (OSError, EOFError):  # somebody cut the connection
            return

    async def _send_no_json(self, record: EndpointRecord) -> None:
        services = self.caller._services
        patience = Patience(PhaseLimits(connect=2, accept=2, call_home=2, prologue=2, first_item=2))
        inbox = Inbox(wheel=services.wheel, patience=patience, instance=record.instance_id)
        try:
            await services.network.open(record, RequestEnvelope(id="unreadable", payload=b"{no json"), inbox)
            await inbox.more()
        except StatorError:
            return
        raise AssertionError("it was read")

    async def trouble(self, going_on: Any) -> None:
        """Connections break, and workers leave for a moment."""
        while going_on():
            await asyncio.sleep(0.05)
            member = self.random.choice(self.members)
            if self.random.random() < 0.7:
                member.cut()
            else:
                await member.runtime.drain()
                await asyncio.sleep(0.02)
                await member.runtime.resume()

    async def run(self, *, faults: bool) -> list[tuple[str, Plan, str]]:
        """All requests; each with its endpoint and how it ended for its caller."""
        waiting: list[Plan | None] = [plan for seed in range(REQUESTS // 500) for plan in plans(seed + 100 * faults)]
        for position in self.random.sample(range(REQUESTS), BAD):
            waiting[position] = None
        ends: list[tuple[str, Plan, str]] = []

        async def caller() -> None:
            while waiting:
                plan, name = waiting.pop(), self.random.choice(ENDPOINTS)
                if plan is None:
                    await self.send_unreadable(name)
                else:
                    end, _ = await carry_out(self.clients[name], plan)
                    ends.append((name, plan, end))

        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(caller())
            if faults:
                group.create_task(self.trouble(lambda: waiting))
        assert len(ends) == REQUESTS - BAD
        return ends


def conserved(runtime: Runtime) -> Sums:
    """Counts of one worker process by endpoint and outcome, after it was seen that they add up at each of its levels."""
    root = Page(runtime.metrics.exposition())
    found: Sums = Counter()
    for name in ENDPOINTS:
        received = root.sum("stator_requests_received_total", endpoint=name)
        outcomes = {outcome: root.sum("stator_requests_total", endpoint=name, outcome=outcome) for outcome in OUTCOMES}
        assert received == sum(outcomes.values()), (name, received, outcomes)
        found[name, "received"] = int(received)
        for outcome, count in outcomes.items():
            found[name, outcome] = int(count)
    for labels, page in levels(runtime):
        assert not page.gauges()
        below = [name for name in ENDPOINTS if all(part in name.split(".") for part in labels.values())]
        entered = root.sum("dynamo_component_requests_total", **labels)
        assert entered == page.sum("dynamo_component_requests_total", **labels)
        assert page.sum("dynamo_component_request_duration_seconds_count", **labels) == entered
        # Those that were refused, or cancelled in the queue, did not get to a handler; unreadable ones count as errors.
        answered = sum(found[name, outcome] for name in below for outcome in ("ok", "error"))
        assert answered <= entered <= answered + sum(found[name, "cancelled"] for name in below)
        assert page.sum("dynamo_component_cancellation_total", **labels) <= sum(found[name, "cancelled"] for name in below)
    return found


def levels(runtime: Runtime) -> list[tuple[dict[str, str], Page]]:
    """The page of each level, and the labels of its samples on the page above. An endpoint's are on the page of its component: each
    serving has a level of its own, which its author does not get to see.
    """
    namespace = runtime.namespace("test")
    found = [({}, Page(runtime.metrics.exposition())), ({"dynamo_namespace": "test"}, Page(namespace.metrics.exposition()))]
    for name in ("backend", "spare"):
        component = Page(namespace.component(name).metrics.exposition())
        labels = {"dynamo_namespace": "test", "dynamo_component": name}
        found.append((labels, component))
        endpoints = [path.split(".")[2] for path in ENDPOINTS if path.split(".")[1] == name]
        found.extend(({**labels, "dynamo_endpoint": endpoint}, component) for endpoint in endpoints)
    return found


@pytest.mark.parametrize("faults", [False, True], ids=["calm", "faults"])
@pytest.mark.parametrize("plane", SOCKET_PLANES)
async def test_received_is_ok_and_error_and_cancelled_and_refused(plane: str, faults: bool) -> None:
    async with Cluster.open(
        plane,
        admission__slots=7,
        admission__queue=4,
        routing__overloaded_for=0.001,
        routing__inhibit_first=0.001,
        routing__inhibit_most=0.01,
    ) as cluster:
        site = Site(cluster, Random(5000 + faults))
        await site.open()
        ends = await site.run(faults=faults)
        await cluster.settled()
        for name, handler in site.handlers.items():
            await eventually(lambda handler=handler: handler.begun == handler.ended, what=f"handlers of {name} have ended")
        total: Sums = Counter()
        for member in site.members:
            await eventually(
                lambda member=member: not Page(member.runtime.metrics.exposition()).gauges(), what="gauges are zero"
            )
            total += conserved(member.runtime)
        await eventually(lambda: not Page(site.caller.metrics.exposition()).gauges(), what="the caller's gauges are zero")
        compare(site, ends, total, faults=faults)


def compare(site: Site, ends: list[tuple[str, Plan, str]], total: Sums, *, faults: bool) -> None:
    """The workers' counts with what handlers and callers saw."""
    for name in ENDPOINTS:
        here = [(plan, end) for called, plan, end in ends if called == name]
        complete = sum(end == "complete" and "stop" not in plan.way for plan, end in here)
        failed = sum(end == "EngineError" for _, end in here)
        assert total[name, "ok"] >= complete, "who got everything was answered well"
        if not faults:  # nobody hears of what happened to a request whose connection was cut
            assert total[name, "ok"] <= sum(end != "EngineError" for _, end in here)
        assert total[name, "error"] >= failed, "who got an error was answered with one"
        assert total[name, "error"] >= site.unreadable[name]
        assert total[name, "received"] - total[name, "refused"] >= site.handlers[name].begun
    print({outcome: sum(total[name, outcome] for name in ENDPOINTS) for outcome in ("received", *OUTCOMES)})
    assert all(sum(total[name, outcome] for name in ENDPOINTS) > REQUESTS / 50 for outcome in OUTCOMES), "the mix is one"
    if not faults:
        assert sum(total[name, "received"] for name in ENDPOINTS) > REQUESTS / 2
