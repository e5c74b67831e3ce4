"""What every plane must do: subclass `PlaneSuite`, say how to make a connected pair, and pytest collects the cases.

    class TestMemoryPlane(PlaneSuite):
        @asynccontextmanager
        async def pair(self): ...

The cases go through the runtime's own serving driver and inboxes, so that what they show is the meaning of a request, not of a plane.
"""

import asyncio
import gc
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any

import msgspec
import pytest

from stator.errors import (
    Cancelled,
    ConnectFailed,
    Disconnected,
    EngineError,
    StatorError,
    StreamIncomplete,
    Timeout,
)
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.ids import endpoint_path
from stator.protocol.records import EndpointRecord, Transport
from stator.runtime.context import Context
from stator.runtime.engine import Handler, generate_function
from stator.runtime.serving import Serving
from stator.tasks import DeadlineWheel
from stator.transports.inbox import Inbox, Patience, PhaseLimits
from stator.transports.plane import PlaneClient, PlaneServer

__all__ = ["Caller", "PlanePair", "PlaneSuite", "count", "eventually", "uncollected"]

INSTANCE = 0x123456789ABCDEF


async def eventually(condition: Callable[[], bool], *, within: float = 5.0, what: str = "condition") -> None:
    """Wait until `condition()` holds; AssertionError after `within` seconds."""
    deadline = asyncio.get_running_loop().time() + within
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"{what} did not come true within {within} s"
        await asyncio.sleep(0.002)


class PlanePair(msgspec.Struct, kw_only=True):
    """A worker's plane and a client's plane that can reach each other, and how to break what is between them."""

    server: PlaneServer
    client: PlaneClient
    cut: Callable[[], None]
    """break the network: both sides see their connections end without a goodbye"""
    open_streams: Callable[[], int]
    """streams, subjects and registry entries held on both sides together; 0 when nothing is going on"""


class Caller:
    """Serves one handler and calls it, over a pair of planes."""

    def __init__(
        self, pair: PlanePair, wheel: DeadlineWheel, handler: Handler, endpoint: str, *, bidirectional: bool = False
    ) -> None:
        self.pair = pair
        self.wheel = wheel
        self.contexts: list[Context] = []
        self.finished = 0
        self.serving = Serving(self._observed(handler), name=f"test.backend.{endpoint}", bidirectional=bidirectional)
        path = endpoint_path(INSTANCE, endpoint)
        bare = EndpointRecord(
            component="backend",
            endpoint=endpoint,
            namespace="test",
            instance_id=INSTANCE,
            transport=Transport(tcp="127.0.0.1:1/x"),
        )
        pair.server.register(path, self.serving)
        self.record = pair.server.describe(bare, path)

    def _observed(self, handler: Handler) -> Callable[[Any, Context], AsyncIterator[Any]]:
        generate = generate_function(handler)

        def start(request: Any, context: Context) -> AsyncIterator[Any]:
            self.contexts.append(context)
            stream = generate(request, context)

            async def observed() -> AsyncIterator[Any]:
                try:
                    async for item in stream:
                        yield item
                finally:
                    self.finished += 1

            return observed()

        return start

    async def open(
        self,
        request: Any = None,
        *,
        limits: PhaseLimits | None = None,
        id: str = "request-1",
        metadata: dict[str, str] | None = None,
        headers: dict[str, str] | None = None,
        record: EndpointRecord | None = None,
    ) -> Inbox:
        record = record or self.record
        patience = Patience(limits or PhaseLimits(connect=10, accept=10, items=20))
        inbox = Inbox(wheel=self.wheel, patience=patience, instance=record.instance_id)
        envelope = RequestEnvelope(id=id, payload=msgspec.json.encode(request), metadata=metadata or {}, headers=headers or {})
        try:
            await self.pair.client.open(record, envelope, inbox)
        except StatorError as error:
            inbox.finish(error)
            raise
        return inbox

    async def collect(self, request: Any = None, **options: Any) -> list[Any]:
        inbox = await self.open(request, **options)
        return await drain(inbox)


async def drain(inbox: Inbox, into: list[Any] | None = None) -> list[Any]:
    """All items until the end; raises the stream's error. `into` keeps what came before an error."""
    items = into if into is not None else []
    while await inbox.more():
        items.extend(inbox.items)
        inbox.items.clear()
    return items


@contextmanager
def uncollected() -> Generator[Counter[str]]:
    """Types of our objects that the block leaves to the cyclic garbage collector, and how many; filled when the block ends."""
    found = Counter[str]()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found.update(type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith("stator"))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


async def count(request: Any, context: Context) -> AsyncIterator[Any]:
    """Yield 0 … n-1."""
    for number in range(request["n"]):
        yield number


async def endless(request: Any, context: Context) -> AsyncIterator[Any]:
    """Yield numbers, a loop tick apart, until stopped."""
    number = 0
    while not context.is_stopped:
        yield number
        number += 1
        await asyncio.sleep(0.001)


class PlaneSuite(ABC):
    """The cases. `max_buffered` is how many 1 KiB items may sit between a running handler and a reader that does not read."""

    max_buffered = 1000

    @abstractmethod
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        """A fresh, connected pair; closing it must leave nothing behind."""
        ...

    @asynccontextmanager
    async def serving(self, handler: Handler, endpoint: str = "generate") -> AsyncGenerator[Caller, None]:
        wheel = DeadlineWheel(asyncio.get_running_loop(), resolution=0.02)
        async with self.pair() as pair:
            caller = Caller(pair, wheel, handler, endpoint)
            yield caller
            await eventually(lambda: caller.serving.inflight == 0, what="all handlers finished")
            await eventually(lambda: pair.open_streams() == 0, what="no stream left on either side")
            # one that was killed may be forgotten here before it arrived there: its handler begins after all streams have ended
            await eventually(lambda: caller.finished == len(caller.contexts), what="all handlers finished")
            assert len(wheel) == 0, "a deadline is still armed"

    # -- items

    async def test_items_arrive_in_order(self) -> None:
        async with self.serving(count) as caller:
            assert await caller.collect({"n": 100}) == list(range(100))

    async def test_an_empty_stream_is_complete(self) -> None:
        async with self.serving(count) as caller:
            assert await caller.collect({"n": 0}) == []

    async def test_ten_thousand_items_from_a_handler_that_never_suspends(self) -> None:
        async with self.serving(count) as caller:
            assert await caller.collect({"n": 10_000}) == list(range(10_000))

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            0,
            -1.5,
            1e30,
            "",
            'grüße 你好 👩‍👩‍👧 \u2028 \x00 "quoted" \\',
            [],
            {},
            [1, [2, {"a": None}]],
            {"data": {"data": 1}, "complete_final": True, "event": "error"},
            2**63,
            -(2**63),
            2**64 - 1,
        ],
    )
    async def test_values_keep_their_form_both_ways(self, value: Any) -> None:
        async def echo(request: Any, context: Context) -> AsyncIterator[Any]:
            yield request
            yield [request]

        async with self.serving(echo) as caller:
            assert await caller.collect(value) == [value, [value]]

    async def test_not_a_number_becomes_null(self) -> None:
        async def broken_numbers(request: Any, context: Context) -> AsyncIterator[Any]:
            yield {"a": float("nan"), "b": [float("inf"), -float("inf")], "c": 1.5}

        async with self.serving(broken_numbers) as caller:
            assert await caller.collect() == [{"a": None, "b": [None, None], "c": 1.5}]

    async def test_an_item_is_taken_when_it_is_yielded(self) -> None:
        async def reuse(request: Any, context: Context) -> AsyncIterator[Any]:
            item = {"n": 0}
            for number in range(100):
                item["n"] = number
                yield item

        async with self.serving(reuse) as caller:
            assert await caller.collect() == [{"n": number} for number in range(100)]

    @pytest.mark.parametrize("size", [70_000, 3_000_000])
    async def test_large_request_and_large_items(self, size: int) -> None:
        async def echo_twice(request: Any, context: Context) -> AsyncIterator[Any]:
            yield request
            yield "between"
            yield request

        async with self.serving(echo_twice) as caller:
            text = "x" * size + "ü"
            assert await caller.collect(text) == [text, "between", text]

    async def test_request_facts_reach_the_handler(self) -> None:
        async def facts(request: Any, context: Context) -> AsyncIterator[Any]:
            yield [context.id, context.metadata, context.headers.get("traceparent")]

        trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        async with self.serving(facts) as caller:
            got = await caller.collect(id="my-id-1", metadata={"tenant": "t1", "ü": "ö"}, headers={"traceparent": trace})
            assert got == [["my-id-1", {"tenant": "t1", "ü": "ö"}, trace]]

    async def test_two_hundred_at_once(self) -> None:
        async with self.serving(count) as caller:
            results = await asyncio.gather(*(caller.collect({"n": n}, id=f"r{n}") for n in range(200)))
            assert results == [list(range(n)) for n in range(200)]

    # -- errors

    async def test_an_error_before_the_first_item(self) -> None:
        async def fails(request: Any, context: Context) -> AsyncIterator[Any]:
            raise ValueError("no such voice")
            yield

        async with self.serving(fails) as caller:
            with pytest.raises(EngineError, match="ValueError: no such voice") as caught:
                await caller.collect()
            assert caught.value.kind == "InvalidArgument"
            assert caught.value.instance == INSTANCE

    async def test_an_error_in_mid_stream_comes_after_the_items(self) -> None:
        async def fails_late(request: Any, context: Context) -> AsyncIterator[Any]:
            yield 1
            yield 2
            raise RuntimeError("gpu on fire")

        async with self.serving(fails_late) as caller:
            got: list[Any] = []
            with pytest.raises(EngineError, match="RuntimeError: gpu on fire") as caught:
                await drain(await caller.open(), got)
            assert got == [1, 2]
            assert caught.value.kind == "Unknown"

    async def test_a_value_without_json_form_is_an_engine_error(self) -> None:
        async def sends_objects(request: Any, context: Context) -> AsyncIterator[Any]:
            yield 1
            yield object()

        async with self.serving(sends_objects) as caller:
            got: list[Any] = []
            with pytest.raises(EngineError):
                await drain(await caller.open(), got)
            assert got == [1]

    async def test_integers_beyond_64_bits_are_an_engine_error(self) -> None:
        async def huge(request: Any, context: Context) -> AsyncIterator[Any]:
            yield 2**64

        async with self.serving(huge) as caller:
            with pytest.raises(EngineError):
                await caller.collect()

    async def test_a_handler_that_cannot_start_refuses(self) -> None:
        def no_generator(request: Any, context: Context) -> AsyncIterator[Any]:
            raise TypeError("missing model")

        async with self.serving(count) as caller:
            refusing = Caller(caller.pair, caller.wheel, no_generator, "refusing")
            with pytest.raises(StatorError, match="TypeError: missing model") as caught:
                await refusing.collect()
            assert not isinstance(caught.value, StreamIncomplete)

    async def test_an_unknown_endpoint_is_an_error_that_may_be_retried_elsewhere(self) -> None:
        async with self.serving(count) as caller:
            caller.pair.server.unregister(endpoint_path(INSTANCE, "generate"))
            with pytest.raises(StatorError) as caught:
                await caller.collect({"n": 1})
            assert caught.value.retryable

    async def test_a_draining_endpoint_refuses_and_running_streams_finish(self) -> None:
        async with self.serving(endless) as caller:
            running = await caller.open()
            assert await running.more()
            caller.serving.drain()
            with pytest.raises(StatorError) as caught:
                await caller.collect()
            assert caught.value.retryable
            before = len(running.items)
            await eventually(lambda: len(running.items) > before, what="the running stream goes on")
            running.stop()
            await drain(running)

    async def test_nobody_listening_fails_to_connect(self) -> None:
        async with self.serving(count) as caller:
            await caller.pair.server.aclose()
            with pytest.raises((ConnectFailed, Disconnected, Timeout)):
                await caller.collect({"n": 1}, limits=PhaseLimits(connect=1, accept=1, call_home=1))

    # -- cancellation

    async def test_stop_lets_the_handler_end_by_itself(self) -> None:
        async def says_goodbye(request: Any, context: Context) -> AsyncIterator[Any]:
            yield "hello"
            await context.stopped()
            assert not context.is_killed
            yield "goodbye"

        async with self.serving(says_goodbye) as caller:
            inbox = await caller.open()
            assert await inbox.more()
            inbox.stop()
            assert await drain(inbox) == ["hello", "goodbye"]

    async def test_stop_before_the_first_item(self) -> None:
        async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
            await context.stopped()
            return
            yield

        async with self.serving(waits) as caller:
            inbox = await caller.open()
            await inbox.opened()
            inbox.stop()
            assert await drain(inbox) == []

    async def test_kill_cancels_the_handler_and_ends_the_reader(self) -> None:
        cancelled = asyncio.Event()

        async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
            try:
                yield 1
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                assert context.is_killed
                cancelled.set()
                raise

        async with self.serving(waits) as caller:
            inbox = await caller.open()
            assert await inbox.more()
            inbox.items.clear()
            inbox.kill()
            with pytest.raises(Cancelled):
                await inbox.more()
            await asyncio.wait_for(cancelled.wait(), 5)

    async def test_kill_before_the_worker_answered(self) -> None:
        async with self.serving(endless) as caller:
            for _ in range(20):
                (await caller.open()).kill()

    async def test_kill_racing_the_end(self) -> None:
        async with self.serving(count) as caller:
            for tick in range(40):
                inbox = await caller.open({"n": 3})
                for _ in range(tick):
                    await asyncio.sleep(0)
                inbox.kill()

    async def test_a_killed_stream_disturbs_nobody(self) -> None:
        async with self.serving(endless) as caller:
            victims = [await caller.open(id=f"v{n}") for n in range(20)]
            survivor = await caller.open(id="survivor")
            assert await survivor.more()
            for victim in victims:
                victim.kill()
            await eventually(lambda: caller.serving.inflight == 1, what="victims gone")
            before = len(survivor.items)
            await eventually(lambda: len(survivor.items) > before, what="the survivor goes on")
            survivor.kill()

    # -- cuts

    async def test_a_cut_in_mid_stream_is_an_incomplete_stream(self) -> None:
        async with self.serving(endless) as caller:
            inbox = await caller.open()
            assert await inbox.more()
            caller.pair.cut()
            with pytest.raises(StreamIncomplete):
                await drain(inbox)
            await eventually(lambda: caller.contexts[0].is_killed, what="the handler was told")

    async def test_a_cut_before_the_first_item_is_a_disconnect(self) -> None:
        async def waits(request: Any, context: Context) -> AsyncIterator[Any]:
            await asyncio.Event().wait()
            yield

        async with self.serving(waits) as caller:
            inbox = await caller.open()
            await inbox.opened()
            caller.pair.cut()
            with pytest.raises(Disconnected) as caught:
                await inbox.more()
            assert not isinstance(caught.value, StreamIncomplete)
            assert caught.value.retryable

    async def test_closing_the_client_plane_kills_what_it_opened(self) -> None:
        async with self.serving(endless) as caller:
            inbox = await caller.open()
            assert await inbox.more()
            await caller.pair.client.aclose()
            with pytest.raises((Disconnected, Cancelled)):
                await drain(inbox)

    async def test_closing_the_server_plane_cuts_its_streams(self) -> None:
        async with self.serving(endless) as caller:
            inbox = await caller.open()
            assert await inbox.more()
            await caller.pair.server.aclose()
            with pytest.raises(Disconnected):
                await drain(inbox)

    async def test_an_instance_that_left_keeps_its_established_streams(self) -> None:
        async with self.serving(endless) as caller:
            inbox = await caller.open()
            assert await inbox.more()
            caller.pair.client.forget(caller.record)
            inbox.items.clear()
            assert await inbox.more()
            inbox.kill()

    # -- deadlines and slow readers

    async def test_a_silent_handler_times_out_by_phase(self) -> None:
        async def silent(request: Any, context: Context) -> AsyncIterator[Any]:
            if request:
                yield "one"
            await asyncio.Event().wait()

        async with self.serving(silent) as caller:
            with pytest.raises(Timeout) as caught:
                await caller.collect(False, limits=PhaseLimits(first_item=0.1))
            assert caught.value.phase == "first item"
            with pytest.raises(Timeout) as caught:
                await caller.collect(True, limits=PhaseLimits(items=0.1))
            assert caught.value.phase == "items"
            with pytest.raises(Timeout) as caught:
                await caller.collect(True, limits=PhaseLimits(total=0.15))
            assert caught.value.phase == "total"
            await eventually(lambda: all(context.is_killed for context in caller.contexts), what="handlers were killed")

    async def test_a_reader_that_does_not_read_is_bounded_and_alone(self) -> None:
        sent = 0

        async def floods(request: Any, context: Context) -> AsyncIterator[Any]:
            nonlocal sent
            while True:
                yield "x" * 1000
                sent += request["slow"]

        async with self.serving(floods) as caller:
            slow = await caller.open({"slow": 1}, id="slow")
            assert await slow.more()
            fast = await caller.open({"slow": 0}, id="fast")
            seen = 0
            while seen < 20_000:
                assert await fast.more()
                seen += len(fast.items)
                fast.items.clear()
            await eventually(lambda: sent > 50, what="the slow stream filled")
            stalled = sent
            while seen < 40_000:
                assert await fast.more()
                seen += len(fast.items)
                fast.items.clear()
            assert sent <= self.max_buffered, f"{sent} items buffered"
            assert sent - stalled <= self.max_buffered / 2
            got = len(slow.items)
            slow.items.clear()
            while got <= stalled + 100:
                assert await slow.more()
                got += len(slow.items)
                slow.items.clear()
            slow.kill()
            fast.kill()

    async def test_nothing_is_left_after_many_requests(self) -> None:
        async with self.serving(count) as caller:
            await caller.collect({"n": 3})
            gc.collect()
            tasks = len(asyncio.all_tasks())
            for number in range(300):
                inbox = await caller.open({"n": 5}, id=f"r{number}")
                if number % 3 == 0:
                    inbox.kill()
                else:
                    assert len(await drain(inbox)) == 5
            await eventually(lambda: caller.serving.inflight == 0)
            await eventually(lambda: caller.pair.open_streams() == 0, what="streams closed")
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks, what="no task left")

    @pytest.mark.parametrize("killed", [False, True])
    async def test_an_ended_request_leaves_the_collector_nothing(self, killed: bool) -> None:
        """What waits for the collector stays in memory for long, and a request may be large."""
        async with self.serving(endless if killed else count) as caller:

            async def five() -> None:
                for number in range(5):
                    inbox = await caller.open({"n": 3}, id=f"r{number}")
                    if killed:
                        assert await inbox.more()
                        inbox.kill()
                    else:
                        assert len(await drain(inbox)) == 3
                await eventually(lambda: caller.serving.inflight == 0)
                await eventually(lambda: caller.pair.open_streams() == 0, what="streams closed")
                await eventually(lambda: caller.finished == 5)
                caller.contexts.clear()
                caller.finished = 0

            await five()
            with uncollected() as found:
                await five()
            assert not found, found
