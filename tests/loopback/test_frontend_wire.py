"""What leaves the socket, and when: one write for the head and the first token, one per batch, comments in silence."""

import asyncio
import re
from collections.abc import AsyncGenerator
from uuid import UUID, uuid4

import pytest

from stator.errors import Timeout
from stator.llm.output import EngineOutput
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, RunningFrontend, chat_body, events_of, frontend

pytestmark = pytest.mark.timeout(30)

CHAT = "/v1/chat/completions"


def tokens(text: bytes, *, last: bool = False) -> list[EngineOutput]:
    """One item per byte; the last one says so."""
    return [
        EngineOutput(token_ids=[byte], finish_reason="stop" if last and n == len(text) - 1 else None)
        for n, byte in enumerate(text)
    ]


class Gate:
    """A script that sends its batches one by one, as the test opens it."""

    def __init__(self, *batches: list[EngineOutput] | Exception) -> None:
        self._batches = batches
        self._steps: asyncio.Queue[None] = asyncio.Queue()

    def step(self) -> None:
        self._steps.put_nowait(None)

    async def script(self, call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        for batch in self._batches:
            await self._steps.get()
            if isinstance(batch, Exception):
                raise batch
            yield batch


class Recording:
    """A transport that remembers what was written at a time."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.writes: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.writes.append(bytes(data))
        self._transport.write(data)

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)


async def test_every_step_is_one_write(models: FakeModels, running: RunningFrontend, raw: RawClient) -> None:
    gate = Gate(tokens(b"h"), tokens(b"ello"), tokens(b"!", last=True))
    engine = models.add("gated", FakeEngine(gate.script))
    await raw.request("POST", CHAT, chat_body("x", model="gated", stream=True))
    async with asyncio.timeout(5):
        while not engine.calls:
            await asyncio.sleep(0.001)
    (connection,) = running.server._runner.server.connections  # type: ignore[union-attr]  # only tests ask
    recording = connection.transport = Recording(connection.transport)
    for _ in range(3):
        gate.step()
    await raw.read_until(b"[DONE]")
    assert [write.count(b'"finish_reason"') for write in recording.writes] == [1, 4, 1, 0]
    assert recording.writes[0].startswith(b"HTTP/1.1 200 OK\r\n")
    assert recording.writes[-1].endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_head_and_first_token_leave_together(models: FakeModels, raw: RawClient) -> None:
    gate = Gate(tokens(b"a"), tokens(b"b", last=True))
    models.add("gated", FakeEngine(gate.script))
    await raw.request("POST", CHAT, chat_body("x", model="gated", stream=True))
    with pytest.raises(TimeoutError):  # nothing before the first token, not even the status
        await asyncio.wait_for(raw.reader.read(1), 0.1)
    gate.step()
    first = await raw.read()
    assert first.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b'"content":"a"' in first
    assert first.endswith(b"}\n\n\r\n")
    gate.step()
    assert b'"content":"b"' in await raw.read_until(b"data: [DONE]\n\n\r\n0\r\n\r\n")


async def test_a_batch_is_one_chunk(models: FakeModels, raw: RawClient) -> None:
    gate = Gate(tokens(b"h"), tokens(b"ello"), tokens(b" you", last=True))
    models.add("gated", FakeEngine(gate.script))
    await raw.request("POST", CHAT, chat_body("x", model="gated", stream=True))
    for _ in range(3):
        gate.step()
    assert (await raw.head())[0] == 200
    chunks = [chunk async for chunk in raw.chunks()]
    assert [chunk.count(b"data: ") for chunk in chunks] == [1, 4, 4, 1]
    assert "".join(event["choices"][0]["delta"]["content"] for event in events_of(b"".join(chunks))) == "hello you"


async def test_the_exact_bytes_of_a_stream(raw: RawClient) -> None:
    request_id = str(uuid4())
    await raw.request("POST", CHAT, chat_body("hé", stream=True), x_dynamo_request_id=request_id)
    status, headers = await raw.head()
    assert status == 200
    assert headers["content-type"] == "text/event-stream"
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    assert headers["x-request-id"] == request_id
    assert headers["server"] == "stator"
    body = b"".join([chunk async for chunk in raw.chunks()]).decode()
    created = re.findall(r'"created":(\d+)', body)[0]
    head = (
        f'data: {{"id":"chatcmpl-{request_id}","object":"chat.completion.chunk","created":{created},"model":"echo",'
        f'"system_fingerprint":null,"choices":[{{"index":0,"delta":'
    )
    assert body == (
        f'{head}{{"role":"assistant","content":"h"}},"logprobs":null,"finish_reason":null}}]}}\n\n'
        f'{head}{{"content":"é"}},"logprobs":null,"finish_reason":"stop"}}]}}\n\n'
        "data: [DONE]\n\n"
    )


async def test_silence_is_filled_with_comments(models: FakeModels) -> None:
    gate = Gate(tokens(b"a"), tokens(b"b", last=True))
    models.add("gated", FakeEngine(gate.script))
    async with frontend(models, silence=0.05) as running, RawClient(running.port) as raw:
        await raw.request("POST", CHAT, chat_body("x", model="gated", stream=True))
        assert (await raw.head())[0] == 200
        chunks = raw.chunks()
        assert [await anext(chunks), await anext(chunks)] == [b": keep-alive\n\n"] * 2
        gate.step()
        texts = [b""]
        while b'"a"' not in texts[-1]:
            texts.append(await anext(chunks))
        assert await anext(chunks) == b": keep-alive\n\n"
        gate.step()
        rest = b"".join([chunk async for chunk in chunks])
        assert rest.endswith(b"data: [DONE]\n\n")
        assert len(events_of(rest)) == 1


async def test_an_error_after_a_comment_is_an_event(models: FakeModels) -> None:
    gate = Gate(Timeout("internal", phase="first item"))
    models.add("gated", FakeEngine(gate.script))
    async with frontend(models, silence=0.05) as running, RawClient(running.port) as raw:
        await raw.request("POST", CHAT, chat_body("x", model="gated", stream=True), x_request_id="mine")
        assert (await raw.head())[0] == 200
        gate.step()
        body = b"".join([chunk async for chunk in raw.chunks()])
    (event,) = events_of(body)
    assert event["error"]["code"] == "timeout"
    assert "first item" in event["error"]["message"]
    assert "mine" in event["error"]["message"]
    assert body.endswith(b"data: [DONE]\n\n")


async def test_keep_alive_carries_many_requests(raw: RawClient) -> None:
    for number in range(3):
        await raw.request("POST", CHAT, chat_body(f"text {number}", stream=bool(number % 2)))
        answer = await raw.answer()
        assert answer.status == 200
        if not number % 2:
            assert answer.json()["choices"][0]["message"]["content"] == f"text {number}"


async def test_http_1_0_gets_a_stream_ended_by_the_connection(raw: RawClient) -> None:
    body = chat_body("old", stream=True)
    head = f"POST {CHAT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    await raw.send(head.encode() + body)
    answer = await raw.answer()
    assert (answer.status, "transfer-encoding" in answer.headers) == (200, False)
    assert [event["choices"][0]["delta"]["content"] for event in events_of(answer.body)] == ["o", "l", "d"]
    assert answer.body.endswith(b"data: [DONE]\n\n")


async def test_expect_continue(raw: RawClient) -> None:
    body = chat_body("later")
    fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\nExpect: 100-continue\r\n\r\n"
    await raw.send(f"POST {CHAT} HTTP/1.1\r\n{fields}".encode())
    assert await raw.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    await raw.send(body)
    assert (await raw.answer()).json()["choices"][0]["message"]["content"] == "later"


async def test_ids_and_headers_travel(models: FakeModels, raw: RawClient) -> None:
    engine = models.add("seen", FakeEngine())
    wanted = uuid4()
    headers = {
        "x_request_id": "client-7",
        "x_dynamo_request_id": wanted.hex.upper(),
        "x_dynamo_meta_tenant": "blue",
        "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    }
    await raw.request("POST", CHAT, chat_body("x", model="seen"), **headers)
    answer = await raw.answer()
    assert answer.headers["x-request-id"] == "client-7"
    assert answer.json()["id"] == f"chatcmpl-{wanted}"
    (call,) = engine.calls
    assert call.request_id == str(wanted)
    assert call.metadata == {"tenant": "blue"}
    assert call.headers.keys() == {"x-request-id", "traceparent"}
    assert call.headers["x-request-id"] == "client-7"
    theirs, ours = headers["traceparent"].split("-"), call.headers["traceparent"].split("-")
    assert (ours[1], ours[3]) == (theirs[1], theirs[3])
    assert ours[2] != theirs[2]  # the frontend's own span is the worker's parent


@pytest.mark.parametrize("given", ["", "with space", "x" * 500, "ünï"])
async def test_an_unusable_request_id_is_replaced(raw: RawClient, given: str) -> None:
    await raw.request("GET", "/live", x_request_id=given)
    shown = (await raw.answer()).headers["x-request-id"]
    assert str(UUID(shown)) == shown


async def test_an_id_in_use_is_replaced(models: FakeModels, running: RunningFrontend, raw: RawClient) -> None:
    gate = Gate(tokens(b"a", last=True))
    engine = models.add("gated", FakeEngine(gate.script))
    wanted = str(uuid4())
    async with RawClient(running.port) as other:
        await raw.request("POST", CHAT, chat_body("x", model="gated"), x_dynamo_request_id=wanted)
        await other.request("POST", CHAT, chat_body("x", model="gated"), x_dynamo_request_id=wanted)
        gate.step()
        gate.step()
        answers = [await raw.answer(), await other.answer()]
    assert all(answer.status == 200 for answer in answers)
    assert len({call.request_id for call in engine.calls}) == 2


async def test_service_routes(raw: RawClient) -> None:
    await raw.request("GET", "/health")
    health = await raw.answer()
    assert (health.status, health.json()["status"]) == (200, "healthy")
    assert {"model": "echo", "instance_id": 1} in health.json()["instances"]
    await raw.request("GET", "/live")
    assert (await raw.answer()).json() == {"status": "live", "message": "Service is live"}
    await raw.request("GET", "/v1/models")
    (entry,) = (await raw.answer()).json()["data"]
    assert (entry["id"], entry["object"], entry["created"], entry["context_window"]) == ("echo", "model", 1_700_000_000, 65_536)
    await raw.request("GET", "/metrics")
    page = await raw.answer()
    assert page.headers["content-type"].startswith("text/plain")
    assert b"# TYPE dynamo_frontend_disconnected_clients gauge" in page.body


async def test_metrics_of_a_stream(models: FakeModels, running: RunningFrontend, raw: RawClient) -> None:
    gate = Gate(tokens(b"a"), tokens(b"bcd"), tokens(b"e", last=True))
    models.add("gated", FakeEngine(gate.script))
    await raw.request("POST", CHAT, chat_body("four", model="gated", stream=True))
    async with asyncio.timeout(5):
        while not running.sample("dynamo_frontend_queued_requests", model="gated"):
            await asyncio.sleep(0.001)
    assert running.sample("dynamo_frontend_inflight_requests", model="gated") == 1
    gate.step()
    await raw.read_until(b'"a"')
    assert running.sample("dynamo_frontend_queued_requests", model="gated") == 0
    gate.step()
    gate.step()
    await raw.read_until(b"[DONE]")
    await running.until_idle()
    labels = {"model": "gated", "endpoint": "chat_completions", "request_type": "stream"}
    assert running.sample("dynamo_frontend_requests_started_total", **labels) == 1
    assert running.sample("dynamo_frontend_requests_total", status="success", error_type="", **labels) == 1
    for name, value in {
        "output_tokens_total": 5,
        "input_sequence_tokens_sum": 4,
        "output_sequence_tokens_sum": 5,
        "time_to_first_token_seconds_count": 1,
        "inter_token_latency_seconds_count": 4,
        "request_duration_seconds_count": 1,
        "inflight_requests": 0,
        "active_requests": 0,
    }.items():
        assert running.sample(f"dynamo_frontend_{name}", model="gated") == value, name


async def test_one_log_line_per_request(running: RunningFrontend, raw: RawClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "stator.request"):
        running.state.log.refresh()
        await raw.request("POST", CHAT, chat_body("abc"), x_request_id="r-1")
        await raw.answer()
        await raw.request("POST", CHAT, chat_body("abc", model="no\nsuch"), x_request_id="r-2")
        await raw.answer()
        await raw.request("GET", "/live")
        await raw.answer()
        await running.until_logged()
    facts = [(record.getMessage(), vars(record)) for record in caplog.records]
    assert [message for message, _ in facts] == ["http request completed"] * 2
    good, bad = facts[0][1], facts[1][1]
    names = ("request_id", "outcome", "status", "endpoint", "model", "stream", "output_tokens", "method", "uri")
    expected = ["r-1", "ok", 200, "chat_completions", "echo", False, 3, "POST", CHAT]
    assert [good[name] for name in names] == expected
    assert 0 < good["ttft_ms"] <= good["duration_ms"]
    assert good["input_tokens"] >= 3
    names = ("request_id", "outcome", "status", "model", "error")
    assert [bad[name] for name in names] == ["r-2", "error", 404, "no\\nsuch", "model_not_found"]


async def test_other_routes_are_logged_for_debugging_only(
    running: RunningFrontend, raw: RawClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", "stator.request"):
        running.state.log.refresh()
        await raw.request("GET", "/live")
        await raw.answer()
        await running.until_logged()
    (line,) = (vars(record) for record in caplog.records)
    assert (line["levelname"], line["method"], line["uri"], line["status"]) == ("DEBUG", "GET", "/live", 200)
