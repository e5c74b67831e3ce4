"""Bidirectional requests on the compatible plane, each side seen by one that is nothing but sockets (`spec/10 §5`)."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from loopback import test_compatible_client as clients
from loopback import test_compatible_worker as workers
from stator.errors import Cancelled, Disconnected
from stator.protocol.call_home import KILL, PROLOGUE, SENTINEL, STOP, encode_handshake
from stator.protocol.control_message import CallHomeAddress, ConnectionInfo, ControlMessage, read_inputs_home
from stator.protocol.envelope import RequestEnvelope
from stator.protocol.request_frame import encode_acknowledgement
from stator.protocol.two_part import encode_frame
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.context import Context
from stator.testing.conversation_suite import Talk
from stator.testing.plane_suite import eventually
from stator.testing.recorded import recorded
from stator.transports.inbox import Patience, PhaseLimits
from stator.transports.inputs import DuplexInbox

pytestmark = pytest.mark.timeout(30)

SUBJECT = "subj-rs-36-worker-bidi-response"


async def echo(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
    """What the recorded worker did."""
    seen = 0
    async for each in inputs:
        seen += 1
        yield {"echo": each, "n": seen}
    yield {"total": seen}


# -- the worker


def inputs_info(worker: workers.Bench, **fields: Any) -> ConnectionInfo:
    home = {"address": f"127.0.0.1:{worker.home.port}", "subject": SUBJECT, "context": "c", "stream_type": "request", **fields}
    return ConnectionInfo.of(CallHomeAddress(**home))


def asked(worker: workers.Bench, request: bytes = b"", **fields: Any) -> bytes:
    """A bidirectional request in good order, but for what is given."""
    fields = {"request_type": "many_in", "request_stream_connection_info": inputs_info(worker), **fields}
    return worker.frame(request, subject="subj-36-worker-bidi-response", **fields)


async def both_calls(worker: workers.Bench) -> tuple[workers.Call, workers.Call]:
    """The connection for inputs and the one for the answer."""
    first, second = await worker.home.call(), await worker.home.call()
    for call in (first, second):
        await call.until(b"}")
    return (first, second) if b'"stream_type":"request"' in first.received else (second, first)


async def test_the_worker_says_what_the_recorded_one_did() -> None:
    async with workers.bench(echo, bidirectional=True) as worker:
        worker.send(asked(worker))
        assert await worker.acknowledgement() == recorded("20-")
        inputs, answer = await both_calls(worker)
        inputs.writer.write(encode_frame(data=b'{"x":1}') + SENTINEL)
        assert await answer.to_end() == recorded("36-")
        assert await inputs.until(b"never") == recorded("37-")


async def test_inputs_that_come_before_their_calls_were_answered_in_msgpack() -> None:
    async with workers.bench(echo, bidirectional=True) as worker:
        worker.send(asked(worker, payload_codec="msgpack"))
        inputs, answer = await both_calls(worker)
        inputs.writer.write(encode_frame(data=b"\x81\xa1x\x01") + SENTINEL)
        assert b"\xa4echo\x81\xa1x\x01" in await answer.to_end()


async def test_the_answer_ends_the_call_for_inputs() -> None:
    async def one(inputs: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        yield await anext(inputs)

    async with workers.bench(one, bidirectional=True) as worker:
        worker.send(asked(worker))
        inputs, answer = await both_calls(worker)
        inputs.writer.write(encode_frame(data=b"1"))
        await answer.to_end()
        async with asyncio.timeout(5):
            while await inputs.reader.read(1000):
                pass


async def test_a_stop_on_either_connection_is_one() -> None:
    for which in (0, 1):
        async with workers.bench(echo, bidirectional=True) as worker:
            worker.send(asked(worker))
            calls = await both_calls(worker)
            calls[0].writer.write(encode_frame(data=b"1"))
            await calls[1].until(b'"echo"')
            calls[which].writer.write(STOP)
            assert b'"total":1' in await calls[1].to_end()
            assert worker.contexts[0].is_stopped
            assert not worker.contexts[0].is_killed


@pytest.mark.parametrize(
    "said",
    [
        pytest.param(KILL, id="kill"),
        pytest.param(encode_frame(data=b"{"), id="undecodable"),
        pytest.param(encode_frame(b'"sentinel"', b"1"), id="header and data"),
        pytest.param(encode_frame(b'"go"'), id="unknown control"),
        pytest.param(encode_frame(data=b"12")[:-1], id="truncated"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_inputs_that_are_not_right_kill_the_request(said: bytes) -> None:
    async with workers.bench(echo, bidirectional=True) as worker:
        worker.send(asked(worker))
        inputs, answer = await both_calls(worker)
        await answer.until(b'"error":null}')
        inputs.writer.write(said)
        inputs.writer.write_eof()
        assert b'"sentinel"' not in await answer.to_end()
        await eventually(lambda: worker.contexts[0].is_killed, what="the handler was told")


async def test_inputs_that_cannot_be_called_for_kill_the_request() -> None:
    async with workers.bench(echo, bidirectional=True) as worker:
        nobody = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = nobody.sockets[0].getsockname()[1]
        nobody.close()
        await nobody.wait_closed()
        worker.send(asked(worker, request_stream_connection_info=inputs_info(worker, address=f"127.0.0.1:{port}")))
        assert await worker.acknowledgement() == recorded("20-")
        await eventually(lambda: worker.serving.inflight == 0, what="the request ended")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda worker: asked(worker, b"1"), "value of its own"),
        (lambda worker: asked(worker, request_stream_connection_info=None), "does not say where its inputs are"),
        (
            lambda worker: asked(worker, request_stream_connection_info=ConnectionInfo(transport="quic", info="{}")),
            "'quic' is not known",
        ),
        (
            lambda worker: asked(worker, request_stream_connection_info=ConnectionInfo(transport="tcp_server", info="{")),
            "does not say where its inputs are",
        ),
        (
            lambda worker: asked(worker, request_stream_connection_info=inputs_info(worker, context="d")),
            "belongs to another request",
        ),
        (
            lambda worker: asked(worker, request_stream_connection_info=inputs_info(worker, stream_type="response")),
            "belongs to another request",
        ),
        (
            lambda worker: asked(worker, request_stream_connection_info=inputs_info(worker, address="nowhere")),
            "'nowhere' is not an address",
        ),
        (lambda worker: worker.frame(b"{}"), "call it with converse"),
    ],
)
async def test_a_request_that_is_not_in_order_is_refused_at_home(make: Callable[[workers.Bench], bytes], text: str) -> None:
    async with workers.bench(echo, bidirectional=True) as worker:
        worker.send(make(worker))
        assert await worker.acknowledgement() == recorded("20-")
        assert text in await (await worker.home.call()).refusal()
        assert worker.contexts == []


async def test_a_request_for_a_unary_handler_is_refused_at_home() -> None:
    async with workers.bench() as worker:
        worker.send(asked(worker))
        assert await worker.acknowledgement() == recorded("20-")
        assert "call it with generate" in await (await worker.home.call()).refusal()


async def test_a_request_that_waits_for_a_slot_calls_nobody() -> None:
    admission = Admission(AdmissionConfig(slots=1))
    async with workers.bench(echo, bidirectional=True, admission=admission) as worker:
        worker.send(asked(worker))
        inputs, answer = await both_calls(worker)
        worker.send(asked(worker))
        await eventually(lambda: worker.serving.inflight == 2, what="the second one waits")
        assert worker.home.calls.empty()
        inputs.writer.write(SENTINEL)
        await answer.to_end()
        answer.reset()
        inputs, answer = await both_calls(worker)
        inputs.writer.write(SENTINEL)
        assert b'"total":0' in await answer.to_end()


# -- the client


async def talk(caller: clients.Bench, **limits: float | None) -> Talk:
    inbox = DuplexInbox(wheel=caller.wheel, patience=Patience(PhaseLimits(**limits)), instance=clients.INSTANCE)
    await caller.client.open(caller.record(), RequestEnvelope(id="req", payload=b"", streams_in=True), inbox)
    return Talk(inbox)


async def inputs_of(request: clients.Request, *, subject: str | None = None) -> clients.Call:
    """Call for the inputs of a request."""
    home = read_inputs_home(request.message)
    call = await clients.dial(home.address, request.dialled)
    call.write(encode_handshake(subject or home.subject, "request"))
    return call


async def test_the_request_is_in_the_recorded_order() -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        message: ControlMessage = request.message
        assert request.data == b""
        assert (message.request_type, message.response_type) == ("many_in", "many_out")
        inputs = read_inputs_home(message)
        assert inputs.address == request.home.address
        assert inputs.subject != request.home.subject
        header = request.header
        places = [header.index(name) for name in (b'"id"', b'"request_type"', b'"connection_info"', b'"request_stream_conn')]
        assert places == sorted(places)
        talking.inbox.kill()


@pytest.mark.parametrize("first", ["inputs", "answer"])
async def test_either_call_may_come_first(first: str) -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        request.acknowledge()
        if first == "inputs":
            inputs = await inputs_of(request)
            answer = await request.call(PROLOGUE)
        else:
            answer = await request.call(PROLOGUE)
            await talking.inbox.opened()
            inputs = await inputs_of(request)
        assert await talking.send(1, "zwei") == 2
        talking.end()
        said = encode_frame(data=b"1") + encode_frame(data=b'"zwei"') + SENTINEL
        assert await inputs.listen(len(said)) == said
        answer.write(clients.items("ok"), clients.END)
        assert await talking.rest() == ["ok"]
        assert await inputs.heard() in (b"", None)


async def test_a_worker_that_hangs_up_on_inputs_still_answers() -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        request.acknowledge()
        inputs, answer = await inputs_of(request), await request.call(PROLOGUE)
        assert await talking.send(1) == 1
        inputs.writer.close()
        async with asyncio.timeout(5):
            while await talking.send("x" * 1000):
                await asyncio.sleep(0)
        assert talking.over
        answer.write(clients.items("still here"), clients.END)
        assert await talking.rest() == ["still here"]


async def test_a_stop_is_said_on_both_connections() -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        request.acknowledge()
        inputs, answer = await inputs_of(request), await request.call(PROLOGUE)
        await talking.inbox.opened()
        await talking.send(1)
        talking.inbox.stop()
        assert await inputs.listen(len(STOP)) == STOP  # what had not left is dropped
        assert await answer.listen(len(STOP)) == STOP
        answer.write(clients.END)
        assert await talking.rest() == []


async def test_a_stop_before_the_calls_is_said_when_they_come() -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        request.acknowledge()
        talking.inbox.stop()
        inputs, answer = await inputs_of(request), await request.call(PROLOGUE)
        assert await inputs.listen(len(STOP)) == STOP
        assert await answer.listen(len(STOP)) == STOP
        answer.write(clients.END)
        assert await talking.rest() == []


async def test_a_kill_ends_both_connections() -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        request.acknowledge()
        inputs, answer = await inputs_of(request), await request.call(PROLOGUE)
        await talking.inbox.opened()
        talking.inbox.kill()
        assert SENTINEL not in (await inputs.heard() or b"")
        assert SENTINEL not in (await answer.heard() or b"")
        with pytest.raises(Cancelled):
            await talking.rest()


async def test_a_worker_that_never_calls_for_inputs_is_a_timeout() -> None:
    async with clients.bench() as caller:
        talking = await talk(caller, input=0.2)
        request = await caller.worker.request()
        request.acknowledge()
        await request.call(PROLOGUE)
        assert await asyncio.wait_for(talking.send(1), 5) == 0
        assert talking.inbox.error is not None
        assert talking.inbox.error.phase == "input"


@pytest.mark.parametrize("how", ["stranger", "twice", "as an answer", "after the end"])
async def test_calls_for_inputs_that_nobody_expects_are_turned_away(how: str) -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        request.acknowledge()
        subject = read_inputs_home(request.message).subject
        match how:
            case "stranger":
                call = await inputs_of(request, subject="0" * 32)
            case "twice":
                await inputs_of(request)
                call = await inputs_of(request)
            case "as an answer":
                call = await request.call(subject=subject)
            case _:
                talking.inbox.kill()
                call = await inputs_of(request)
        assert not await call.heard()
        talking.inbox.kill()


async def test_a_refused_request_expects_no_calls() -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        request.writer.write(encode_acknowledgement(b"Server overloaded: worker at capacity"))
        with pytest.raises(Exception, match="capacity"):
            await talking.rest()
        assert talking.over
        assert caller.client.open_streams == 0


async def test_a_worker_that_ends_before_it_calls() -> None:
    async with clients.bench() as caller:
        talking = await talk(caller)
        request = await caller.worker.request()
        request.acknowledge()
        inputs = await inputs_of(request)
        await eventually(lambda: talking.inbox.phase > 1, what="the acknowledgement came")
        request.writer.close()
        inputs.writer.close()
        with pytest.raises(Disconnected):
            await talking.rest()
        assert talking.over
