"""Every request ends exactly once: with its last item, a typed error or a cancellation. A seeded mix on every plane."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import msgspec
import pytest

from stator.errors import Cancelled, Disconnected, EngineError, Overloaded, StatorError, Timeout, Unavailable
from stator.runtime import Client
from stator.runtime.context import Context
from stator.testing.cluster import PLANES, Cluster, open_files, tasks_now
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(110)

REQUESTS = 500
AT_ONCE = 40

FATES = (
    "ok",
    "ok",
    "ok",
    "empty",
    "error",
    "late error",
    "refuse",
    "full",
    "slow",
    "slow",
    "stubborn",
    "endless",
    "unsendable",
)
WAYS = (
    "read",
    "read",
    "read",
    "batches",
    "break",
    "leave",
    "kill",
    "stop",
    "cancel",
    "context kill",
    "context stop",
    "timeout",
)


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One request: what its handler does, and what its caller does."""

    fate: str
    way: str
    items: int
    after: int
    """items its caller reads before it acts"""
    delay: float
    """seconds before a caller that does not wait for items acts"""


class Workers:
    """The handler of all workers; counts beginnings and ends."""

    def __init__(self) -> None:
        self.begun = 0
        self.ended = 0

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.begun += 1
        try:
            async for item in self._answer(request["fate"], request["items"], context):
                yield item
        finally:
            self.ended += 1

    async def _answer(self, fate: str, items: int, context: Context) -> AsyncIterator[Any]:
        if fate == "refuse":
            raise Unavailable("not yet")
        if fate == "full":
            raise Overloaded("no slot")
        if fate == "error":
            raise ValueError("as told")
        number = 0
        while fate != "empty" and (number < items or fate == "endless") and not context.is_stopped:
            yield number
            number += 1
            if fate in ("slow", "endless"):
                await asyncio.sleep(0.001)
            elif fate == "stubborn":
                try:
                    await asyncio.sleep(0.001)
                except asyncio.CancelledError:
                    pass
        if fate == "late error":
            raise RuntimeError("as told")
        if fate == "unsendable":
            yield object()


def plans(seed: int) -> list[Plan]:
    random = Random(seed)
    return [
        Plan(
            fate=(fate := random.choice(FATES)),
            way=random.choice([way for way in WAYS if fate != "endless" or way not in ("read", "batches")]),
            items=random.choice((1, 2, 10, 100)),
            after=random.choice((0, 1, 5)),
            delay=random.choice((0.0, 0.0, 0.001, 0.01, 0.03)),
        )
        for _ in range(REQUESTS)
    ]


async def carry_out(client: Client, plan: Plan) -> tuple[str, list[Any]]:
    """Make the request; how it ended and what had come until then."""
    got: list[Any] = []
    context = Context(f"{plan.way}")
    options = {"timeout": 0.001 + plan.delay} if plan.way == "timeout" else {}
    stream = client.generate({"fate": plan.fate, "items": plan.items}, context, **options)

    async def read() -> str:
        match plan.way:
            case "batches":
                async for batch in stream.batches():
                    got.extend(batch)
            case "break":
                async for item in stream:
                    got.append(item)
                    if len(got) > plan.after:
                        return "left"
            case "leave":
                async with stream:
                    async for item in stream:
                        got.append(item)
                        if len(got) > plan.after:
                            return "left"
            case _:
                async with stream:
                    async for item in stream:
                        got.append(item)
        return "complete"

    reading = asyncio.ensure_future(read())
    if plan.way in ("kill", "stop", "cancel", "context kill", "context stop"):
        await asyncio.sleep(plan.delay)
        {
            "kill": stream.kill,
            "stop": stream.stop,
            "cancel": reading.cancel,
            "context kill": context.kill,
            "context stop": context.stop,
        }[plan.way]()
    try:
        return await reading, got
    except asyncio.CancelledError:
        return "cancelled", got
    except StatorError as error:
        return type(error).__name__, got


def allowed(plan: Plan, *, faults: bool) -> set[str]:
    """How a request may end."""
    ends = {
        "error": {EngineError},
        "late error": {EngineError},
        "unsendable": {EngineError},
        "refuse": {Unavailable, Overloaded},
        "full": {Overloaded, Unavailable},
    }.get(plan.fate, set())
    names = {kind.__name__ for kind in ends}
    if not ends or "stop" in plan.way:
        names.add("complete")
    if plan.way in ("break", "leave"):
        names.add("left")
    if plan.way == "cancel":
        names.add("cancelled")
    if "kill" in plan.way:
        names.add(Cancelled.__name__)
    if plan.way == "timeout":
        names.add(Timeout.__name__)
    # Workers that refused others are passed over for a while: capacity may be what is missing.
    names |= {Overloaded.__name__, Unavailable.__name__}
    if faults:
        names |= {Disconnected.__name__, "StreamIncomplete", "ConnectFailed"}
    return names


@pytest.mark.parametrize("faults", [False, True], ids=["calm", "faults"])
@pytest.mark.parametrize("plane", PLANES)
async def test_every_request_ends_exactly_once(plane: str, faults: bool) -> None:
    async with Cluster.open(
        plane, routing__overloaded_for=0.001, routing__inhibit_first=0.001, routing__inhibit_most=0.01
    ) as cluster:
        workers = Workers()
        for _ in range(3):
            await cluster.worker(workers)
        client = await cluster.client("random")
        for worker in cluster.workers:  # connections are made before anything is counted
            await client.direct({"fate": "empty", "items": 0}, worker.id).collect()
        await cluster.settled()
        before, files = tasks_now(), len(open_files())
        if (
            plane == "auto" and faults
        ):  # a worker whose connection was just cut may be reached by the other plane, which pools its own
            files += 2 * len(cluster.workers) + 2
        ends = await _run(cluster, client, faults=faults)
        await cluster.settled()
        await eventually(lambda: workers.begun == workers.ended, what="every handler that began has ended")
        await eventually(lambda: tasks_now() == before, what="no task is left")
        await eventually(lambda: len(open_files()) <= files, what="no file is left open")
        assert len(ends) == REQUESTS
        for plan, (end, items) in ends:
            assert end in allowed(plan, faults=faults), f"{plan} ended with {end}"
            assert items == list(range(len(items))), f"{plan} lost or repeated items: {items[:10]}"
            if end == "complete" and plan.fate in ("ok", "slow", "stubborn") and "stop" not in plan.way:
                assert len(items) == plan.items, f"{plan} is complete with {len(items)} items"
        kinds = Counter(end for _, (end, _) in ends)
        assert kinds["complete"] > REQUESTS / 20  # the mix is one
        assert min(kinds[name] for name in ("EngineError", "Cancelled", "cancelled", "left")) > 0


async def _run(cluster: Cluster, client: Client, *, faults: bool) -> list[tuple[Plan, tuple[str, list[Any]]]]:
    seed = 2024 + faults
    waiting = plans(seed)[::-1]
    ends: list[tuple[Plan, tuple[str, list[Any]]]] = []

    async def caller() -> None:
        while waiting:
            plan = waiting.pop()
            ends.append((plan, await carry_out(client, plan)))

    async def trouble() -> None:
        random = Random(seed)
        while waiting:
            await asyncio.sleep(0.02)
            random.choice(cluster.workers).cut()

    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(caller())
        if faults:
            group.create_task(trouble())
    return ends
