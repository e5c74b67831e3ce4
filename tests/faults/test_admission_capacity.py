"""Workers at capacity: who gets a slot, who waits for one, who is refused and how soon, and that every slot comes back."""

import asyncio
from collections.abc import AsyncIterator
from random import Random
from statistics import median
from time import perf_counter
from typing import Any

import pytest

from stator.errors import Cancelled, Disconnected, EngineError, Overloaded, StatorError, Timeout, Unavailable
from stator.protocol.stream import Phase
from stator.runtime import Client, Context, ResponseStream, Runtime
from stator.runtime.admission import Admission
from stator.testing.cluster import Cluster, ClusterWorker
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(100)

OTHER = "test.backend.other"
PLANES = ("native", "native-tcp", "compatible")


class Desk:
    """A handler that answers when it is told to, or after a time that the request names."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.running = 0
        self.most = 0
        self.handled: list[Any] = []

    async def generate(self, request: Any, context: Context) -> AsyncIterator[Any]:
        self.running += 1
        self.most = max(self.most, self.running)
        self.handled.append(request)
        try:
            if isinstance(request, float):
                await asyncio.sleep(request)
            elif request == "error":
                raise ValueError("as told")
            elif request == "items":
                for number in range(20):
                    yield number
                    await asyncio.sleep(0.001)
            else:
                await self.open.wait()
            yield "done"
        finally:
            self.running -= 1


def admission(worker: ClusterWorker) -> Admission:
    return worker.runtime._services.meter.admission  # pyright: ignore[reportPrivateUsage]  # its numbers are the point


def limits(slots: int, queue: int) -> dict[str, Any]:
    return {"admission__slots": slots, "admission__queue": queue}


def asked(client: Client, number: int, request: Any = "wait", **options: Any) -> list[asyncio.Task[list[Any]]]:
    """Requests that run, each in a task."""

    async def ask() -> list[Any]:
        return await client.generate(request, **options).collect()

    return [asyncio.ensure_future(ask()) for _ in range(number)]


async def filled(worker: ClusterWorker) -> None:
    await eventually(lambda: admission(worker).full, what="slots and queue are full")


async def called_home(client: Client, number: int) -> None:
    """Who is being answered knows it, so that news of the record are none of his request. Only calls home take time for that."""
    planes: Any = client._services.network._clients  # pyright: ignore[reportPrivateUsage]
    if "tcp" in planes:
        calls = planes["tcp"]._listener._connected
        await eventually(
            lambda: sum(each._stream is not None and each._stream._inbox.phase is Phase.FIRST_ITEM for each in calls) == number,
            what=f"{number} requests have heard that they are answered",
        )


async def no_more_held(worker: ClusterWorker) -> None:
    await eventually(lambda: (admission(worker).running, admission(worker).queued) == (0, 0), what="every slot is back")


def shown(runtime: Runtime, name: str) -> float:
    """The series of a metric, added up."""
    lines = runtime.metrics.exposition().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)


# -- nothing is refused while there is room


@pytest.mark.load
@pytest.mark.parametrize("callers", [1, 3])
@pytest.mark.parametrize("policy", ["round_robin", "random", "least_loaded"])
@pytest.mark.parametrize("plane", ["native", "compatible"])
async def test_nothing_is_refused_while_a_slot_is_free(plane: str, policy: str, callers: int) -> None:
    """As many requests as there are slots, of random length, sent by callers that do not know of each other."""
    random = Random(20)
    async with Cluster.open(plane) as cluster:
        desks = [Desk(), Desk()]
        workers = [await cluster.worker(desk, **limits(4, 2)) for desk in desks]
        clients = [await cluster.client(policy) for _ in range(callers)]
        done = 0

        async def ask_on() -> None:
            nonlocal done
            for _ in range(60):
                assert await random.choice(clients).generate(random.expovariate(100)).collect() == ["done"]
                done += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(ask_on())
        assert done == 480
        assert max(desk.most for desk in desks) <= 4
        for worker in workers:
            await no_more_held(worker)


@pytest.mark.parametrize("plane", PLANES)
async def test_a_slot_that_somebody_else_gave_back_is_found(plane: str) -> None:
    """A caller that was refused everywhere asks again: what it heard a moment ago need not be so any more."""
    async with Cluster.open(plane) as cluster:
        desks = [Desk(), Desk()]
        workers = [await cluster.worker(desk, **limits(1, 0)) for desk in desks]
        first, second = await cluster.client(), await cluster.client()
        running = asked(first, 2)
        for worker in workers:
            await filled(worker)
        with pytest.raises(Overloaded):
            await second.generate("wait").collect()
        desks[0].open.set()
        await eventually(lambda: admission(workers[0]).running == 0)
        assert await second.generate("wait").collect() == ["done"]
        desks[1].open.set()
        assert await asyncio.gather(*running) == [["done"]] * 2


# -- refusal


@pytest.mark.load
@pytest.mark.parametrize("plane", PLANES)
async def test_a_refusal_is_quick_and_names_the_limit(plane: str) -> None:
    async with Cluster.open(plane) as cluster:
        desks = [Desk(), Desk()]
        workers = [await cluster.worker(desk, **limits(3, 2)) for desk in desks]
        client = await cluster.client()
        waiting = asked(client, 10)
        for worker in workers:
            await filled(worker)
        took: list[float] = []
        for _ in range(40):
            began = perf_counter()
            with pytest.raises(
                Overloaded, match=r"3 requests run \(admission.slots = 3\) and 2 wait \(admission.queue = 2\)"
            ) as no:
                await client.generate("wait").collect()
            took.append(perf_counter() - began)
            assert no.value.retryable
        assert median(took) < 0.010 * 5, "10 ms where nothing else runs"
        assert sum(len(desk.handled) for desk in desks) == 6
        refused = sum(shown(worker.runtime, "stator_requests_total") for worker in workers)
        assert refused >= 80, "each worker was asked each time"
        for desk in desks:
            desk.open.set()
        assert await asyncio.gather(*waiting) == [["done"]] * 10


# -- the queue


@pytest.mark.parametrize("plane", PLANES)
async def test_the_queue_is_first_in_first_out(plane: str) -> None:
    async with Cluster.open(plane) as cluster:
        desk = Desk()
        worker = await cluster.worker(desk, **limits(1, 10))
        client = await cluster.client()
        asking = asked(client, 1, "wait 0")
        for number in range(1, 6):
            asking += asked(client, 1, f"wait {number}")
            await eventually(lambda number=number: admission(worker).queued == number)
        desk.open.set()
        await asyncio.gather(*asking)
        assert desk.handled == [f"wait {number}" for number in range(6)]
        assert desk.most == 1


@pytest.mark.parametrize("how", ["kill", "stop", "timeout", "cancel", "leave"])
@pytest.mark.parametrize("plane", PLANES)
async def test_who_wants_no_answer_any_more_does_not_get_to_the_handler(plane: str, how: str) -> None:
    """Native: it leaves the queue at once. Compatible: nobody can tell the worker before it calls home, so that ends in its turn."""
    async with Cluster.open(plane) as cluster:
        desk = Desk()
        worker = await cluster.worker(desk, **limits(1, 4))
        client = await cluster.client()
        (first,) = asked(client, 1, "first")
        await eventually(lambda: desk.running == 1)
        streams = [client.generate("waits", timeout=0.3 if how == "timeout" else None) for _ in range(4)]
        reading = [asyncio.ensure_future(_read(stream)) for stream in streams]
        await filled(worker)
        if how in ("kill", "stop"):
            for stream in streams:
                getattr(stream, how)()
        elif how in ("cancel", "leave"):
            for task in reading:
                task.cancel()
        if plane == "compatible" and how == "stop":
            desk.open.set()
        ended = await asyncio.gather(*reading, return_exceptions=True)
        wanted = {"kill": Cancelled, "stop": list, "timeout": Timeout}.get(how, asyncio.CancelledError)
        assert {type(each) for each in ended} == {wanted}
        if plane != "compatible":
            await eventually(lambda: admission(worker).queued == 0, what="the queue is empty")
            assert desk.running == 1
        desk.open.set()
        assert await first == ["done"]
        await no_more_held(worker)
        if plane != "compatible":
            assert "waits" not in desk.handled


async def _read(stream: ResponseStream) -> list[Any]:
    async with stream:
        return await stream.collect()


@pytest.mark.parametrize("plane", PLANES)
async def test_a_queued_request_waits_as_long_as_it_takes_to_get_a_slot(plane: str) -> None:
    """The limit for accepting is not for waiting in the queue."""
    async with Cluster.open(plane, accept_timeout=0.2) as cluster:
        desk = Desk()
        worker = await cluster.worker(desk, **limits(1, 1))
        client = await cluster.client()
        asking = asked(client, 2)
        await filled(worker)
        await asyncio.sleep(0.6)  # three times the limit, in which nothing happens
        assert not any(task.done() for task in asking)
        desk.open.set()
        assert await asyncio.gather(*asking) == [["done"]] * 2


@pytest.mark.parametrize("plane", PLANES)
async def test_two_endpoints_of_one_process_share_slots_and_queue(plane: str) -> None:
    async with Cluster.open(plane) as cluster:
        one, two = Desk(), Desk()
        worker = await cluster.worker(one, **limits(2, 2))
        second = await cluster.worker(two, endpoint=OTHER, runtime=worker.runtime)
        client, other = await cluster.client(), await cluster.client(endpoint=OTHER)
        running = asked(client, 2)
        await eventually(lambda: one.running == 2)
        queued = asked(other, 2)
        await filled(worker)
        for each in (client, other):
            with pytest.raises(Overloaded, match=r"admission.slots = 2"):
                await each.generate("wait").collect()
        assert two.running == 0
        one.open.set()
        assert await asyncio.gather(*running) == [["done"]] * 2
        await eventually(lambda: two.running == 2, what="the other endpoint's requests have the slots")
        two.open.set()
        assert await asyncio.gather(*queued) == [["done"]] * 2
        await no_more_held(worker)
        await second.served.finish(1.0)


@pytest.mark.parametrize("plane", PLANES)
async def test_closing_one_endpoint_leaves_the_queue_of_the_other(plane: str) -> None:
    async with Cluster.open(plane) as cluster:
        one, two = Desk(), Desk()
        worker = await cluster.worker(one, **limits(1, 3))
        second = await cluster.worker(two, endpoint=OTHER, runtime=worker.runtime)
        client, other = await cluster.client(), await cluster.client(endpoint=OTHER)
        running = asked(client, 1)
        await eventually(lambda: one.running == 1)
        queued, kept = asked(other, 2), asked(client, 1)
        await filled(worker)
        await second.served.aclose()
        for answer in await asyncio.gather(*queued, return_exceptions=True):
            assert isinstance(answer, Unavailable | Disconnected) and answer.retryable
        assert (admission(worker).running, admission(worker).queued) == (1, 1)
        one.open.set()
        assert await asyncio.gather(*running, *kept) == [["done"]] * 2
        await no_more_held(worker)


@pytest.mark.parametrize("spares", [0, 1])
@pytest.mark.parametrize("plane", PLANES)
async def test_a_drain_with_a_full_queue_fails_nobody_who_can_go_elsewhere(plane: str, spares: int) -> None:
    """What runs is answered here, what waits is answered elsewhere, however much that is; alone, it is told to try again."""
    async with Cluster.open(plane, instance_timeout=0.05) as cluster:
        desk = Desk()
        worker = await cluster.worker(desk, **limits(2, 300))
        client = await cluster.client()
        asking = asked(client, 302)
        await filled(worker)
        for _ in range(spares):
            await cluster.worker(desk)
            await client.wait_for_instances(2, timeout=5)
        finishing = asyncio.ensure_future(worker.served.finish(20))
        await eventually(lambda: worker.id not in client.instance_ids())
        desk.open.set()
        answers = await asyncio.gather(*asking, return_exceptions=True)
        if spares:
            assert answers == [["done"]] * 302
        else:
            assert answers.count(["done"]) >= 2
            assert all(answer == ["done"] or isinstance(answer, Unavailable | Disconnected) for answer in answers)
        await asyncio.wait_for(finishing, 5)
        await no_more_held(worker)


@pytest.mark.parametrize("elsewhere", [True, False])
@pytest.mark.parametrize("plane", PLANES)
async def test_closing_with_a_full_queue_tells_everybody(plane: str, elsewhere: bool) -> None:
    """Who waited goes to another worker if there is one; who was being answered is told that the worker shuts down."""
    async with Cluster.open(plane, instance_timeout=0.05) as cluster:
        desk, spare = Desk(), Desk()
        spare.open.set()
        worker = await cluster.worker(desk, **limits(2, 5))
        client = await cluster.client()
        asking = asked(client, 7, retry="never" if not elsewhere else "auto")
        await filled(worker)
        if elsewhere:
            await cluster.worker(spare)
            await client.wait_for_instances(2, timeout=5)
        await called_home(client, 2)
        await worker.served.aclose()
        answers = await asyncio.wait_for(asyncio.gather(*asking, return_exceptions=True), 10)
        if elsewhere:
            assert answers == [["done"]] * 7
        else:
            kinds = [each.kind if isinstance(each, EngineError) else type(each).__name__ for each in answers]
            assert kinds.count("EngineShutdown") == 2
            assert set(kinds) <= {"EngineShutdown", "Unavailable", "Disconnected"}, "the news of the record may be first"
        await no_more_held(worker)


@pytest.mark.parametrize("plane", PLANES)
async def test_the_page_shows_slots_queue_and_refusals(plane: str) -> None:
    async with Cluster.open(plane) as cluster:
        desk = Desk()
        worker = await cluster.worker(desk, **limits(2, 3))
        client = await cluster.client()
        asking = asked(client, 5)
        await filled(worker)
        for _ in range(4):
            with pytest.raises(Overloaded):
                await client.direct("wait", worker.id).collect()
        expected = {
            "dynamo_work_handler_pool_active_tasks": 2,
            "dynamo_work_handler_pool_capacity": 2,
            "dynamo_work_handler_queue_depth": 3,
            "dynamo_work_handler_queue_capacity": 3,
        }
        assert {name: shown(worker.runtime, name) for name in expected} == expected
        desk.open.set()
        await asyncio.gather(*asking)
        await no_more_held(worker)
        assert shown(worker.runtime, "dynamo_work_handler_pool_active_tasks") == 0
        assert shown(worker.runtime, "dynamo_work_handler_queue_depth") == 0


# -- conservation


@pytest.mark.load
@pytest.mark.parametrize("plane", PLANES)
async def test_every_slot_comes_back_after_two_thousand_requests(plane: str) -> None:
    """Random lengths, errors, kills, stops, timeouts and cancellations, more of them than there is room for."""
    random = Random(7)
    slots, queue = 5, 4
    async with Cluster.open(plane) as cluster:
        desks = [Desk(), Desk()]
        workers = [await cluster.worker(desk, **limits(slots, queue)) for desk in desks]
        clients = [await cluster.client() for _ in range(2)]
        seen: dict[str, int] = {}

        async def one() -> str:
            request = random.choice((0.0, 0.002, 0.02, "items", "items", "error"))
            how = random.choice(("read",) * 6 + ("kill", "stop", "timeout", "cancel"))
            stream = random.choice(clients).generate(request, timeout=0.01 if how == "timeout" else None)
            reading = asyncio.ensure_future(_read(stream))
            await asyncio.sleep(random.uniform(0, 0.01))
            if how in ("kill", "stop"):
                getattr(stream, how)()
            elif how == "cancel":
                reading.cancel()
            try:
                await asyncio.wait_for(reading, 20)
            except StatorError as error:
                return type(error).__name__
            except asyncio.CancelledError:
                return "cancelled"
            return "answered"

        async def many() -> None:
            for _ in range(100):
                what = await one()
                seen[what] = seen.get(what, 0) + 1

        async with asyncio.TaskGroup() as group:
            for _ in range(24):
                group.create_task(many())
        assert sum(seen.values()) == 2400
        assert {"answered", "Overloaded", "EngineError", "Timeout", "Cancelled", "cancelled"} >= set(seen)
        assert seen["answered"] > 500 and seen["Overloaded"] > 5, seen
        for worker, desk in zip(workers, desks, strict=True):
            await no_more_held(worker)
            assert desk.most <= slots
            desk.handled.clear()
        await asyncio.sleep(0)
        full = [task for worker in workers for task in asked_of(clients[0], worker, slots + queue)]
        for worker, desk in zip(workers, desks, strict=True):
            await filled(worker)
            await eventually(lambda desk=desk: desk.running == slots, what="as many slots as in the beginning")
            desk.open.set()
        assert await asyncio.gather(*full) == [["done"]] * len(full)


def asked_of(client: Client, worker: ClusterWorker, number: int) -> list[asyncio.Task[list[Any]]]:
    async def ask() -> list[Any]:
        return await client.direct("wait", worker.id).collect()

    return [asyncio.ensure_future(ask()) for _ in range(number)]
