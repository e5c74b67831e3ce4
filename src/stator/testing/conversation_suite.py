"""What every plane must do with requests of many inputs: the bidirectional section of `stator.testing.plane_suite`, used like it.

class TestMemoryConversations(ConversationSuite):
    @asynccontextmanager
    async def pair(self): ...
"""

import asyncio
import gc
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from random import Random
from typing import Any

import pytest

from stator.errors import Cancelled, Disconnected, EngineError, StatorError, StreamIncomplete, Timeout
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.records import EndpointRecord
from stator.runtime.context import Context
from stator.runtime.engine import Handler
from stator.tasks import DeadlineWheel
from stator.testing.plane_suite import INSTANCE, Caller, PlanePair, count, drain, eventually
from stator.transports.inbox import Patience, PhaseLimits
from stator.transports.inputs import DuplexInbox

__all__ = ["ConversationSuite", "Talk", "Talker"]

_LIMITS = PhaseLimits(connect=10, accept=10, items=20, input=20)

Inputs = AsyncIterator[Any]


class Talk:
    """One conversation, as its caller has it."""

    def __init__(self, inbox: DuplexInbox) -> None:
        self.inbox = inbox
        self._clear = False

    @property
    def over(self) -> bool:
        """Whether no input is taken any more."""
        return self.inbox.sender.over

    async def send(self, *inputs: Any) -> int:
        """Send in turn; returns how many were taken."""
        for number, each in enumerate(inputs):
            if not self._clear:
                await self.inbox.ready()
            if self.over:
                return number
            self._clear = self.inbox.sender.send(each)
        return len(inputs)

    def end(self) -> None:
        self.inbox.sender.end()

    async def next(self) -> Any:
        """The next item of the answer."""
        assert await self.inbox.more(), "the answer has ended"
        return self.inbox.items.popleft()

    async def rest(self) -> list[Any]:
        return await drain(self.inbox)


class Talker(Caller):
    """Serves one bidirectional handler and talks to it, over a pair of planes."""

    def __init__(self, pair: PlanePair, wheel: DeadlineWheel, handler: Handler, endpoint: str) -> None:
        super().__init__(pair, wheel, handler, endpoint, bidirectional=True)

    async def talk(
        self,
        *,
        limits: PhaseLimits = _LIMITS,
        id: str = "request-1",
        metadata: dict[str, str] | None = None,
        record: EndpointRecord | None = None,
    ) -> Talk:
        record = record or self.record
        inbox = DuplexInbox(wheel=self.wheel, patience=Patience(limits), instance=record.instance_id)
        envelope = RequestEnvelope(id=id, payload=b"", metadata=metadata or {}, streams_in=True)
        try:
            await self.pair.client.open(record, envelope, inbox)
        except StatorError as error:
            inbox.finish(error)
            raise
        return Talk(inbox)


async def echo(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
    """Answer each input with itself, then say bye."""
    async for each in inputs:
        yield each
    yield "bye"


async def total(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
    """One answer to all inputs."""
    seen = [each async for each in inputs]
    yield len(seen)


async def deaf(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
    """Take nothing, until stopped."""
    yield "ready"
    await context.stopped()


class ConversationSuite(ABC):
    """The cases. `max_buffered` is how many 1 KiB inputs or items may sit between one who sends and one who does not read."""

    max_buffered = 1000
    patience = 5.0
    """seconds in which what a thousand callers left behind must be gone"""

    @abstractmethod
    def pair(self) -> AbstractAsyncContextManager[PlanePair]:
        """A fresh, connected pair; closing it must leave nothing behind."""
        ...

    @asynccontextmanager
    async def serving(self, handler: Handler, endpoint: str = "converse") -> AsyncGenerator[Talker, None]:
        wheel = DeadlineWheel(asyncio.get_running_loop(), resolution=0.02)
        async with self.pair() as pair:
            talker = Talker(pair, wheel, handler, endpoint)
            yield talker
            await eventually(lambda: talker.serving.inflight == 0, what="all handlers finished")
            await eventually(lambda: pair.open_streams() == 0, what="no stream left on either side")
            await eventually(lambda: len(wheel) == 0, what="no deadline armed")
            assert talker.finished == len(talker.contexts)

    # -- items both ways

    async def test_each_input_is_answered_before_the_next_is_sent(self) -> None:
        async with self.serving(echo) as talker:
            talk = await talker.talk()
            for number in range(20):
                assert await talk.send(number) == 1
                assert await talk.next() == number
            talk.end()
            assert await talk.rest() == ["bye"]
            assert talk.over

    async def test_all_inputs_then_one_answer(self) -> None:
        async with self.serving(total) as talker:
            talk = await talker.talk()
            await talk.send(*range(100))
            talk.end()
            assert await talk.rest() == [100]

    async def test_no_inputs(self) -> None:
        async with self.serving(total) as talker:
            talk = await talker.talk()
            talk.end()
            assert await talk.rest() == [0]

    async def test_answers_before_the_first_input(self) -> None:
        async def greets(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            yield "hello"
            async for each in inputs:
                yield each

        async with self.serving(greets) as talker:
            talk = await talker.talk()
            assert await talk.next() == "hello"
            await talk.send(1)
            talk.end()
            assert await talk.rest() == [1]

    async def test_the_end_of_the_inputs_does_not_end_the_answer(self) -> None:
        async def goes_on(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            async for _ in inputs:
                pass
            for number in range(50):
                assert not context.is_stopped
                yield number
                await asyncio.sleep(0.001)

        async with self.serving(goes_on) as talker:
            talk = await talker.talk()
            await talk.send("x")
            talk.end()
            assert await talk.rest() == list(range(50))

    async def test_ten_thousand_inputs_from_a_caller_that_never_suspends(self) -> None:
        async with self.serving(total) as talker:
            talk = await talker.talk()
            assert await talk.send(*range(10_000)) == 10_000
            talk.end()
            assert await talk.rest() == [10_000]

    @pytest.mark.parametrize("value", [None, 0, -1.5, "", "grüße 👩‍👩‍👧 \u2028 \x00", [], {}, [1, [2, {"a": None}]], 2**64 - 1])
    async def test_inputs_keep_their_form(self, value: Any) -> None:
        async with self.serving(echo) as talker:
            talk = await talker.talk()
            await talk.send(value, [value])
            talk.end()
            assert await talk.rest() == [value, [value], "bye"]

    @pytest.mark.parametrize("size", [65_530, 70_000, 3_000_000])
    async def test_large_inputs(self, size: int) -> None:
        async with self.serving(echo) as talker:
            talk = await talker.talk()
            text = "x" * size + "ü"
            await talk.send(text)
            assert await talk.next() == text
            await talk.send("between", text)
            talk.end()
            assert await talk.rest() == ["between", text, "bye"]

    async def test_an_input_is_taken_when_it_is_sent(self) -> None:
        async with self.serving(echo) as talker:
            talk = await talker.talk()
            value = {"n": 0}
            for number in range(50):
                value["n"] = number
                await talk.send(value)
            talk.end()
            assert await talk.rest() == [*({"n": number} for number in range(50)), "bye"]

    async def test_an_input_without_json_form_is_an_error_and_nothing_is_sent(self) -> None:
        async with self.serving(echo) as talker:
            talk = await talker.talk()
            await talk.send(1)
            with pytest.raises(EngineError):
                await talk.send(object())
            await talk.send(2)
            talk.end()
            assert await talk.rest() == [1, 2, "bye"]

    async def test_request_facts_reach_the_handler(self) -> None:
        async def facts(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            yield [context.id, context.metadata]

        async with self.serving(facts) as talker:
            talk = await talker.talk(id="my-id", metadata={"a": "ü"})
            assert await talk.rest() == [["my-id", {"a": "ü"}]]

    async def test_two_hundred_at_once(self) -> None:
        async def one(number: int, talker: Talker) -> list[Any]:
            talk = await talker.talk(id=f"r{number}")
            await talk.send(*range(number))
            talk.end()
            return await talk.rest()

        async with self.serving(echo) as talker:
            results = await asyncio.gather(*(one(number, talker) for number in range(200)))
            assert results == [[*range(number), "bye"] for number in range(200)]

    # -- the answer ends first

    async def test_a_worker_that_ends_early_tells_the_sender(self) -> None:
        async def takes_one(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            async for each in inputs:
                yield each
                return

        async with self.serving(takes_one) as talker:
            talk = await talker.talk()
            text = "x" * 1000
            sent = 0
            async with asyncio.timeout(10):
                while await talk.send(text):
                    sent += 1
            assert sent <= self.max_buffered
            assert await talk.rest() == [text]
            assert await talk.send(text) == 0

    async def test_a_sender_that_waits_hears_of_the_end(self) -> None:
        async with self.serving(deaf) as talker:
            talk = await talker.talk()
            assert await talk.next() == "ready"
            waiting = asyncio.get_running_loop().create_task(self._flood(talk))
            await eventually(lambda: talk.inbox._sending_since is not None, what="the sender waits")  # pyright: ignore[reportPrivateUsage]
            await asyncio.sleep(0.05)
            assert not waiting.done()
            talker.contexts[0].stop()  # the handler ends by itself
            assert await talk.rest() == []
            assert await asyncio.wait_for(waiting, 5) <= self.max_buffered

    async def test_a_handler_that_raises(self) -> None:
        async def fails(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            async for each in inputs:
                yield each
                raise ValueError("enough of that")

        async with self.serving(fails) as talker:
            talk = await talker.talk()
            await talk.send(1, 2, 3)
            got: list[Any] = []
            with pytest.raises(EngineError, match="ValueError: enough of that"):
                await drain(talk.inbox, got)
            assert got == [1]
            assert talk.over

    async def test_a_unary_request_is_not_for_a_bidirectional_handler(self) -> None:
        async with self.serving(echo) as talker:
            with pytest.raises(EngineError, match="bidirectional") as caught:
                await talker.collect({"n": 1})
            assert caught.value.kind == "InvalidArgument"
            assert not talker.contexts

    async def test_a_bidirectional_request_is_not_for_a_unary_handler(self) -> None:
        async with self.serving(echo) as talker:
            unary = Caller(talker.pair, talker.wheel, count, "unary")
            talk = await talker.talk(record=unary.record)
            with pytest.raises(EngineError, match="bidirectional") as caught:
                await talk.rest()
            assert caught.value.kind == "InvalidArgument"
            assert await talk.send(1) == 0
            assert not unary.contexts
            assert await unary.collect({"n": 2}) == [0, 1]

    async def test_an_unknown_endpoint(self) -> None:
        async with self.serving(echo) as talker:
            talker.pair.server.unregister(f"{INSTANCE:x}/converse")
            talk = await talker.talk()
            with pytest.raises(StatorError) as caught:
                await talk.rest()
            assert caught.value.retryable
            assert talk.over

    async def test_a_draining_endpoint_refuses_and_running_conversations_finish(self) -> None:
        async with self.serving(echo) as talker:
            running = await talker.talk()
            await running.send(1)
            assert await running.next() == 1
            talker.serving.drain()
            refused = await talker.talk()
            with pytest.raises(StatorError) as caught:
                await refused.rest()
            assert caught.value.retryable
            await running.send(2)
            running.end()
            assert await running.rest() == [2, "bye"]

    # -- stop and kill

    async def test_stop_ends_the_inputs_and_the_handler_says_goodbye(self) -> None:
        async def says_goodbye(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            async for each in inputs:
                yield each
            assert context.is_stopped
            assert not context.is_killed
            yield "goodbye"

        async with self.serving(says_goodbye) as talker:
            talk = await talker.talk()
            await talk.send(1)
            assert await talk.next() == 1
            talk.inbox.stop()
            assert talk.over
            assert await talk.send(2) == 0
            assert await talk.rest() == ["goodbye"]

    async def test_stop_behind_the_end_of_the_inputs(self) -> None:
        async def waits(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            yield [each async for each in inputs]
            await context.stopped()
            yield "goodbye"

        async with self.serving(waits) as talker:
            talk = await talker.talk()
            await talk.send(1)
            talk.end()
            assert await talk.next() == [1]
            talk.inbox.stop()
            assert await talk.rest() == ["goodbye"]

    async def test_stop_while_the_sender_waits(self) -> None:
        async with self.serving(deaf) as talker:
            talk = await talker.talk()
            waiting = asyncio.get_running_loop().create_task(self._flood(talk))
            assert await talk.next() == "ready"
            talk.inbox.stop()
            assert await talk.rest() == []
            await asyncio.wait_for(waiting, 5)

    async def test_kill_cancels_a_handler_that_waits_for_input(self) -> None:
        ends: list[str] = []

        async def waits(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            try:
                yield "ready"
                async for each in inputs:
                    yield each
                ends.append("inputs")
            except BaseException as error:
                ends.append(type(error).__name__)
                raise

        async with self.serving(waits) as talker:
            talk = await talker.talk()
            assert await talk.next() == "ready"
            talk.inbox.kill()
            assert await talk.send(1) == 0
            with pytest.raises(Cancelled):
                await talk.rest()
            await eventually(lambda: ends == ["CancelledError"], what="the handler was cancelled")
            assert talker.contexts[0].is_killed

    async def test_kill_while_the_sender_waits(self) -> None:
        async with self.serving(deaf) as talker:
            talk = await talker.talk()
            waiting = asyncio.get_running_loop().create_task(self._flood(talk))
            assert await talk.next() == "ready"
            talk.inbox.kill()
            await asyncio.wait_for(waiting, 5)

    async def test_kill_behind_the_end_of_the_inputs(self) -> None:
        async with self.serving(deaf) as talker:
            talk = await talker.talk()
            await talk.send(1)
            talk.end()
            assert await talk.next() == "ready"
            talk.inbox.kill()
            await eventually(lambda: talker.contexts[0].is_killed, what="the handler was told")

    @pytest.mark.parametrize("end", ["kill", "stop"])
    async def test_ends_before_the_worker_answered(self, end: str) -> None:
        async with self.serving(echo) as talker:
            for ticks in range(20):
                talk = await talker.talk(id=f"r{ticks}")
                for _ in range(ticks):
                    await asyncio.sleep(0)
                getattr(talk.inbox, end)()
                if end == "stop":
                    assert await talk.rest() in ([], ["bye"])

    # -- cuts

    async def test_a_cut_ends_both_sides(self) -> None:
        async with self.serving(echo) as talker:
            talk = await talker.talk()
            await talk.send(1)
            assert await talk.next() == 1
            talker.pair.cut()
            with pytest.raises(StreamIncomplete):
                await talk.rest()
            assert await talk.send(2) == 0
            await eventually(lambda: talker.contexts[0].is_killed, what="the handler was told")

    async def test_a_cut_while_the_sender_waits(self) -> None:
        async with self.serving(deaf) as talker:
            talk = await talker.talk()
            waiting = asyncio.get_running_loop().create_task(self._flood(talk))
            assert await talk.next() == "ready"
            await eventually(lambda: talk.inbox._sending_since is not None, what="the sender waits")  # pyright: ignore[reportPrivateUsage]
            talker.pair.cut()
            await asyncio.wait_for(waiting, 5)
            with pytest.raises(Disconnected):
                await talk.rest()

    @pytest.mark.parametrize("side", ["client", "server"])
    async def test_a_plane_that_closes_ends_its_conversations(self, side: str) -> None:
        async with self.serving(echo) as talker:
            talk = await talker.talk()
            await talk.send(1)
            assert await talk.next() == 1
            await getattr(talker.pair, side).aclose()
            with pytest.raises((Disconnected, Cancelled)):
                await talk.rest()
            assert talk.over
            await eventually(lambda: talker.contexts[0].is_killed, what="the handler was told")

    async def test_an_instance_that_left_keeps_its_conversations(self) -> None:
        async with self.serving(echo) as talker:
            talk = await talker.talk()
            await talk.send(1)
            assert await talk.next() == 1
            talker.pair.client.forget(talker.record)
            await talk.send(2)
            talk.end()
            assert await talk.rest() == [2, "bye"]

    # -- slow sides

    async def test_a_handler_that_does_not_read_stops_its_caller_and_no_other(self) -> None:
        async with self.serving(deaf) as talker:
            other = Talker(talker.pair, talker.wheel, echo, "echo")
            talk = await talker.talk(id="slow")
            sent = [0]
            waiting = asyncio.get_running_loop().create_task(self._flood(talk, sent))
            assert await talk.next() == "ready"
            await eventually(lambda: sent[0] > 50, what="the slow conversation filled")
            for number in range(20):
                quick = await talker.talk(id=f"quick-{number}", record=other.record)
                await quick.send(*["x" * 1000] * 100)
                quick.end()
                assert len(await quick.rest()) == 101
            assert sent[0] <= self.max_buffered, f"{sent[0]} inputs buffered"
            assert not waiting.done()
            talk.inbox.kill()
            await asyncio.wait_for(waiting, 5)

    async def test_a_slow_handler_gets_every_input(self) -> None:
        async def slow(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            seen = 0
            async for _ in inputs:
                seen += 1
                if seen % 500 == 0:
                    await asyncio.sleep(0.01)
            yield seen

        async with self.serving(slow) as talker:
            talk = await talker.talk()
            n = 3 * self.max_buffered
            assert await talk.send(*["x" * 1000] * n) == n
            talk.end()
            assert await talk.rest() == [n]

    async def test_a_caller_that_does_not_read_stops_the_handler_and_then_itself(self) -> None:
        answered = 0

        async def counts(inputs: Inputs, context: Context) -> AsyncIterator[Any]:
            nonlocal answered
            async for each in inputs:
                yield each
                answered += 1

        async with self.serving(counts) as talker:
            talk = await talker.talk()
            sent = [0]
            waiting = asyncio.get_running_loop().create_task(self._flood(talk, sent))
            await eventually(lambda: answered > 50, what="answers filled their way")
            before = -1
            while before != sent[0]:
                before = sent[0]
                await asyncio.sleep(0.2)
            assert sent[0] <= 2 * self.max_buffered
            assert not waiting.done()
            got = 0
            while got <= before:  # and goes on when it is read
                assert await talk.inbox.more()
                got += len(talk.inbox.items)
                talk.inbox.items.clear()
            talk.inbox.kill()
            await asyncio.wait_for(waiting, 5)

    async def test_a_sender_that_waits_too_long_is_a_timeout_of_the_input(self) -> None:
        async with self.serving(deaf) as talker:
            talk = await talker.talk(limits=PhaseLimits(input=0.2))
            await asyncio.wait_for(self._flood(talk), 10)
            got: list[Any] = []
            with pytest.raises(Timeout) as caught:
                await drain(talk.inbox, got)
            assert caught.value.phase == "input"
            assert got == ["ready"]
            await eventually(lambda: talker.contexts[0].is_killed, what="the handler was told")

    # -- nothing is left

    async def test_a_thousand_conversations_cancelled_anywhere_leave_nothing(self) -> None:
        random = Random(20_263)
        async with self.serving(echo) as talker:
            warm = await talker.talk()
            warm.end()
            assert await warm.rest() == ["bye"]
            await eventually(lambda: talker.pair.open_streams() == 0)
            gc.collect()
            tasks = len(asyncio.all_tasks())
            for batch in range(20):
                await asyncio.gather(*(self._abandoned(talker, f"r{batch}-{n}", random) for n in range(50)))
            await eventually(lambda: talker.serving.inflight == 0, within=self.patience, what="handlers ended")
            await eventually(lambda: talker.pair.open_streams() == 0, what="streams closed")
            await eventually(lambda: len(asyncio.all_tasks()) <= tasks, what="no task left")

    async def _abandoned(self, talker: Talker, id: str, random: Random) -> None:
        """A conversation that is killed, stopped, or cancelled, at any point."""
        talk: Talk | None = None

        async def whole() -> None:
            nonlocal talk
            talk = await talker.talk(id=id)
            for number in range(5):
                await talk.send(number)
                await talk.next()
            talk.end()
            await talk.rest()

        task = asyncio.get_running_loop().create_task(whole())
        for _ in range(random.randrange(60)):
            await asyncio.sleep(0)
        how: Callable[[DuplexInbox], None] = random.choice((DuplexInbox.kill, DuplexInbox.stop))
        if talk is not None:
            how(talk.inbox)
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.exception()
        if talk is not None:
            talk.inbox.kill()

    async def _flood(self, talk: Talk, sent: list[int] | None = None) -> int:
        """Send until nothing is taken any more; returns how many were."""
        sent = [0] if sent is None else sent
        text = "x" * 1000
        while await talk.send(text):
            sent[0] += 1
        return sent[0]
