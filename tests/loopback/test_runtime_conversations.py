"""Conversations through the runtime, on every plane: sending, given inputs, other instances, limits, and what is left."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from stator.errors import Cancelled, Disconnected, EngineError, StreamIncomplete, Timeout, UsageError
from stator.runtime.context import Context
from stator.testing.cluster import PLANES, Cluster, tasks_now
from stator.testing.plane_suite import count, eventually

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(params=PLANES)
async def cluster(request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    async with Cluster.open(request.param) as cluster:
        yield cluster


async def echo(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
    async for each in inputs:
        yield each
    yield "stopped" if context.is_stopped else "bye"


async def numbers(n: int) -> AsyncIterator[int]:
    for number in range(n):
        yield number


# -- talking


async def test_send_and_read_in_turn(cluster: Cluster) -> None:
    await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse(id="talk-1", metadata={"a": "b"}) as conversation:
        assert conversation.id == "talk-1"
        assert conversation.instance_id in client.instance_ids()
        for number in range(10):
            assert await conversation.send({"n": number})
            assert await anext(conversation) == {"n": number}
        await conversation.end_input()
        await conversation.end_input()
        assert [item async for item in conversation] == ["bye"]


async def test_given_inputs_are_sent_while_the_answer_is_read(cluster: Cluster) -> None:
    await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse(inputs=numbers(3000)) as conversation:
        assert await conversation.collect() == [*range(3000), "bye"]


async def test_given_inputs_wait_for_a_reader(cluster: Cluster) -> None:
    given = 0

    async def texts() -> AsyncIterator[str]:
        nonlocal given
        while True:
            yield "x" * 10_000
            given += 1

    await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse(inputs=texts()) as conversation:
        before = -1
        while before != given:
            before = given
            await asyncio.sleep(0.2)
        assert 0 < given < 4000
        assert await anext(conversation) == "x" * 10_000


async def test_a_handler_without_context(cluster: Cluster) -> None:
    async def total(inputs: AsyncIterator[int]) -> AsyncIterator[Any]:
        yield sum([each async for each in inputs])

    await cluster.worker(total, bidirectional=True)
    client = await cluster.client()
    async with client.converse(inputs=numbers(10)) as conversation:
        assert await conversation.collect() == [45]


async def test_a_conversation_inside_of_a_conversation(cluster: Cluster) -> None:
    inner = await cluster.worker(echo, bidirectional=True, endpoint="test.backend.inner")
    onward = await cluster.client(endpoint="test.backend.inner")

    async def pass_on(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        async with onward.converse(context, inputs=inputs) as conversation:
            async for item in conversation:
                yield item

    await cluster.worker(pass_on, bidirectional=True)
    client = await cluster.client()
    async with client.converse(inputs=numbers(100)) as conversation:
        assert await conversation.collect() == [*range(100), "bye"]
    async with client.converse() as conversation:  # a stop goes all the way, and so does the end of the inputs that it is
        await conversation.send(1)
        assert await anext(conversation) == 1
        conversation.stop()
        assert await conversation.collect() in (["stopped"], ["bye"], [])
    async with client.converse() as conversation:
        await conversation.send(1)
        assert await anext(conversation) == 1
        conversation.kill()
    await eventually(lambda: inner.served.inflight == 0, what="the inner conversation ended")


# -- ends


async def test_the_end_of_the_answer_ends_the_sending(cluster: Cluster) -> None:
    async def one(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        yield await anext(inputs)

    await cluster.worker(one, bidirectional=True)
    client = await cluster.client()
    async with client.converse() as conversation:
        async with asyncio.timeout(10):
            while await conversation.send("x" * 1000):
                pass
        assert await conversation.collect() == ["x" * 1000]
        assert not await conversation.send(1)
        await conversation.end_input()


async def test_stop_ends_given_inputs_and_says_goodbye(cluster: Cluster) -> None:
    closed = asyncio.Event()

    async def slow() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.Event().wait()
        finally:
            closed.set()

    await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse(inputs=slow()) as conversation:
        assert await anext(conversation) == 1
        conversation.stop()
        assert await conversation.collect() == ["stopped"]
    assert closed.is_set()


async def test_leaving_early_kills_and_ends_given_inputs(cluster: Cluster) -> None:
    before = tasks_now()
    worker = await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse(inputs=numbers(10**9)) as conversation:
        await anext(conversation)
    with pytest.raises(Cancelled):
        await conversation.collect()
    await eventually(lambda: worker.served.inflight == 0, what="the handler ended")
    assert not [name for name in tasks_now() if name == "inputs"], before


async def test_inputs_that_raise_end_the_conversation(cluster: Cluster) -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise OSError("no microphone")

    worker = await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse(inputs=broken()) as conversation:
        with pytest.raises(UsageError, match="OSError: no microphone") as caught:
            await conversation.collect()
        assert isinstance(caught.value.__cause__, OSError)
    await eventually(lambda: worker.served.inflight == 0, what="the handler was killed")


async def test_inputs_without_json_form(cluster: Cluster) -> None:
    async def broken() -> AsyncIterator[Any]:
        yield 1
        yield object()

    await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse() as conversation:
        with pytest.raises(UsageError, match="cannot be sent"):
            await conversation.send(object())
        await conversation.send(1)
        assert await anext(conversation) == 1
    async with client.converse(inputs=broken()) as conversation:
        with pytest.raises(UsageError, match="cannot be sent"):
            await conversation.collect()


async def test_a_caller_that_is_cancelled_kills(cluster: Cluster) -> None:
    worker = await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    reading = asyncio.Event()

    async def talk() -> None:
        async with client.converse(inputs=numbers(1)) as conversation:
            async for _ in conversation:
                reading.set()
                await asyncio.Event().wait()

    task = asyncio.create_task(talk())
    await asyncio.wait_for(reading.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(lambda: worker.served.inflight == 0, what="the handler ended")


async def test_a_worker_that_drains_lets_conversations_finish(cluster: Cluster) -> None:
    worker = await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse() as conversation:
        await conversation.send(1)
        assert await anext(conversation) == 1
        finishing = asyncio.create_task(worker.served.finish(10))
        await conversation.send(2)
        assert await anext(conversation) == 2
        assert not finishing.done()
        await conversation.end_input()
        assert await conversation.collect() == ["bye"]
        await asyncio.wait_for(finishing, 5)


async def test_a_worker_that_closes_says_so(cluster: Cluster) -> None:
    worker = await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse() as conversation:
        await conversation.send(1)
        assert await anext(conversation) == 1
        await worker.served.aclose()
        with pytest.raises(EngineError) as caught:
            await conversation.collect()
        assert caught.value.kind == "EngineShutdown"
        assert not await conversation.send(2)


# -- other instances


async def test_a_draining_instance_is_not_the_end(cluster: Cluster) -> None:
    first = await cluster.worker(echo, bidirectional=True)
    await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    first.served.drain()
    for _ in range(4):
        async with client.converse(inputs=numbers(3)) as conversation:
            assert await conversation.collect() == [0, 1, 2, "bye"]
            assert conversation.instance_id != first.id


async def test_a_lost_instance_is_the_end_once_it_accepted(cluster: Cluster) -> None:
    calls: list[str] = []

    async def waits(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        calls.append(context.id)
        async for each in inputs:
            yield each

    workers = [await cluster.worker(waits, bidirectional=True) for _ in range(2)]
    client = await cluster.client()
    async with client.converse() as conversation:
        for worker in workers:
            worker.cut()
        with pytest.raises(Disconnected):
            await conversation.collect()
        assert not await conversation.send(1)
    assert len(calls) == 1


async def test_a_cut_behind_the_first_item_is_an_incomplete_answer(cluster: Cluster) -> None:
    worker = await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse() as conversation:
        await conversation.send(1)
        assert await anext(conversation) == 1
        worker.cut()
        with pytest.raises(StreamIncomplete):
            await conversation.collect()


# -- a worker at capacity


async def test_a_conversation_waits_for_its_slot(cluster: Cluster) -> None:
    worker = await cluster.worker(echo, bidirectional=True, admission__slots=1)
    client = await cluster.client()
    async with client.converse(id="first") as first:
        second = client.converse(id="second", inputs=numbers(3))

        async def whole() -> list[Any]:
            async with second:
                return await second.collect()

        waiting = asyncio.create_task(whole())
        await eventually(lambda: worker.served.inflight == 2, what="the second one waits")
        await first.send(1)
        assert await anext(first) == 1
        assert not waiting.done()
        await first.end_input()
        assert await first.collect() == ["bye"]
        assert await asyncio.wait_for(waiting, 5) == [0, 1, 2, "bye"]


@pytest.mark.parametrize("end", ["stop", "cancel"])
async def test_a_conversation_that_is_not_wanted_any_more_leaves_the_queue(cluster: Cluster, end: str) -> None:
    worker = await cluster.worker(echo, bidirectional=True, admission__slots=1)
    client = await cluster.client()
    async with client.converse(id="first") as first:
        second = client.converse(id="second", inputs=numbers(3))
        opening = asyncio.create_task(second.__aenter__())
        await eventually(lambda: worker.served.inflight == 2, what="the second one waits")
        if end == "stop":
            second.stop()
            if cluster.plane != "compatible":  # its stop goes to a connection that is made with the slot
                async with asyncio.timeout(5):
                    await opening
                    assert await second.collect() == []
        opening.cancel()
        await asyncio.wait([opening])
        await second.__aexit__(None, None, None)
        if cluster.plane != "compatible":
            await eventually(lambda: worker.served.inflight == 1, what="it left the queue")
        await first.end_input()
        assert await first.collect() == ["bye"]
    await eventually(lambda: worker.served.inflight == 0, what="nothing is left")


# -- limits


async def test_a_caller_that_sends_nothing_for_too_long() -> None:
    seen: list[str] = []

    async def impatient(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        try:
            async for each in inputs:
                yield each
        except Timeout as error:
            seen.append(error.phase)
            yield "are you there?"

    for plane in PLANES:
        async with Cluster.open(plane, input_timeout=0.2) as cluster:
            await cluster.worker(impatient, bidirectional=True)
            client = await cluster.client()
            async with client.converse() as conversation:
                await conversation.send(1)
                assert await conversation.collect() == [1, "are you there?"]
    assert seen == ["input"] * len(PLANES)


async def test_a_handler_that_does_not_catch_it_fails(cluster: Cluster) -> None:
    await cluster.worker(echo, bidirectional=True, input_timeout=0.2)
    client = await cluster.client()
    async with client.converse() as conversation:
        with pytest.raises(EngineError, match=r"input took longer than 0\.2 s"):
            await conversation.collect()


async def test_a_worker_that_takes_nothing_for_too_long(cluster: Cluster) -> None:
    async def deaf(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        yield "ready"
        await context.stopped()

    await cluster.worker(deaf, bidirectional=True)
    client = await cluster.client()
    async with client.converse(limits={"input": 0.3}) as conversation:
        assert await anext(conversation) == "ready"
        async with asyncio.timeout(20):
            while await conversation.send("x" * 100_000):
                pass
        with pytest.raises(Timeout) as caught:
            await conversation.collect()
        assert caught.value.phase == "input"


async def test_the_whole_time(cluster: Cluster) -> None:
    await cluster.worker(echo, bidirectional=True)
    client = await cluster.client()
    async with client.converse(timeout=0.3) as conversation:
        with pytest.raises(Timeout) as caught:
            await conversation.collect()
        assert caught.value.phase == "total"


# -- misuse


async def test_misuse_is_said_at_once() -> None:
    async with Cluster.open() as cluster:
        await cluster.worker(echo, bidirectional=True)
        client = await cluster.client()
        conversation = client.converse()
        with pytest.raises(UsageError, match="enter the conversation"):
            await conversation.send(1)
        with pytest.raises(UsageError, match="enter the conversation"):
            await conversation.end_input()
        with pytest.raises(UsageError, match="enter the conversation"):
            await conversation.collect()
        async with client.converse() as conversation:
            await conversation.end_input()
            with pytest.raises(UsageError, match="has ended"):
                await conversation.send(1)
        async with client.converse(inputs=numbers(1)) as conversation:
            with pytest.raises(UsageError, match="given its inputs"):
                await conversation.send(1)


async def test_two_senders_at_once() -> None:
    async def deaf(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        yield "ready"
        await context.stopped()

    async with Cluster.open() as cluster:
        await cluster.worker(deaf, bidirectional=True)
        client = await cluster.client()
        async with client.converse() as conversation:

            async def flood() -> None:
                while await conversation.send("x" * 100_000):
                    pass

            first = asyncio.create_task(flood())
            inbox = conversation._duplex()  # pyright: ignore[reportPrivateUsage]
            await eventually(lambda: inbox._sending_since is not None, what="the first waits")  # pyright: ignore[reportPrivateUsage]
            with pytest.raises(UsageError, match="one task at a time"):
                await conversation.send(1)
            conversation.stop()
            await asyncio.wait_for(first, 5)


async def test_requests_of_the_other_kind(cluster: Cluster) -> None:
    await cluster.worker(echo, bidirectional=True)
    await cluster.worker(count, endpoint="test.backend.unary")
    bidirectional, unary = await cluster.client(), await cluster.client(endpoint="test.backend.unary")
    with pytest.raises(EngineError, match="converse") as caught:
        await bidirectional.generate({"n": 1}).collect()
    assert caught.value.kind == "InvalidArgument"
    with pytest.raises(EngineError, match="generate") as caught:
        async with unary.converse():
            pass
    assert caught.value.kind == "InvalidArgument"
    assert await unary.generate({"n": 2}).collect() == [0, 1]


async def test_a_canary_of_a_bidirectional_endpoint_has_one_input() -> None:
    async with Cluster.open() as cluster:
        worker = await cluster.worker(echo, bidirectional=True)
        serving = worker.served._serving  # pyright: ignore[reportPrivateUsage]
        assert [item async for item in serving.probe("hello", "canary")] == ["hello", "bye"]
