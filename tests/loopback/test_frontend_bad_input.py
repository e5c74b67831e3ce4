"""Clients that err, and clients that mean harm: always a 4xx as OpenAI writes it, no 5xx, no hang, no memory."""

import asyncio
import gzip
import threading
import tracemalloc
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from stator.llm.output import EngineOutput
from stator.llm.tokenizer import ByteTokenizer
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import Answer, RawClient, RunningFrontend, chat_body, frontend

pytestmark = pytest.mark.timeout(60)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MIB = 2**20


def error_of(answer: Answer, status: int) -> dict[str, Any]:
    """The error object of an answer with `status`, in OpenAI's shape."""
    assert answer.status == status, answer.body[:500]
    assert answer.headers["content-type"].startswith("application/json")
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"] == "invalid_request_error"
    return error


MESSAGE = {"role": "user", "content": "x"}
BODIES: dict[str, tuple[str, bytes, str | None]] = {
    "empty": (CHAT, b"", None),
    "not json": (CHAT, b"hello", None),
    "truncated": (CHAT, chat_body("x")[:-1], None),
    "trailing garbage": (CHAT, chat_body("x") + b"}", None),
    "an array": (CHAT, b"[]", None),
    "null": (CHAT, b"null", None),
    "no model": (CHAT, msgspec.json.encode({"messages": [MESSAGE]}), "model"),
    "no messages": (CHAT, msgspec.json.encode({"model": "echo"}), "messages"),
    "empty messages": (CHAT, msgspec.json.encode({"model": "echo", "messages": []}), "messages"),
    "messages of a wrong type": (CHAT, msgspec.json.encode({"model": "echo", "messages": "x"}), "messages"),
    "content of a wrong type": (
        CHAT,
        msgspec.json.encode({"model": "echo", "messages": [{"role": "user", "content": 1}]}),
        "messages",
    ),
    "unknown role": (CHAT, msgspec.json.encode({"model": "echo", "messages": [{"role": "king", "content": "x"}]}), "messages"),
    "model of a wrong type": (CHAT, msgspec.json.encode({"model": 7, "messages": [MESSAGE]}), "model"),
    "unknown parameter": (CHAT, chat_body("x", shiny=True), "shiny"),
    "temperature": (CHAT, chat_body("x", temperature=2.5), "temperature"),
    "temperature as text": (CHAT, chat_body("x", temperature="hot"), "temperature"),
    "top_p": (CHAT, chat_body("x", top_p=-1), "top_p"),
    "n": (CHAT, chat_body("x", n=0), "n"),
    "huge n": (CHAT, chat_body("x", n=10**30), "n"),
    "max_tokens": (CHAT, chat_body("x", max_tokens=-1), "max_tokens"),
    "stop": (CHAT, chat_body("x", stop=["a"] * 5), "stop"),
    "stream options without stream": (CHAT, chat_body("x", stream_options={"include_usage": True}), "stream_options"),
    "invalid UTF-8": (CHAT, chat_body("@").replace(b"@", b"\xff\xfe"), None),
    "lone surrogate": (CHAT, chat_body("@").replace(b"@", b"\\ud800"), None),
    "deep nesting": (CHAT, b'{"model":' + b"[" * 200_000, None),
    "deep nesting in a known place": (
        CHAT,
        chat_body("x", metadata={"@": 1}).replace(b'{"@":1}', b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
        None,
    ),
    "number too large": (CHAT, chat_body("x", seed=1).replace(b'"seed":1', b'"seed":1' + b"0" * 5000), "seed"),
    "infinite number": (CHAT, chat_body("x", temperature=1).replace(b'"temperature":1', b'"temperature":1e999'), None),
    "prompt missing": (COMPLETIONS, msgspec.json.encode({"model": "echo"}), "prompt"),
    "prompt of a wrong type": (COMPLETIONS, msgspec.json.encode({"model": "echo", "prompt": {"a": 1}}), "prompt"),
    "empty prompts": (COMPLETIONS, msgspec.json.encode({"model": "echo", "prompt": []}), "prompt"),
    "mixed prompts": (COMPLETIONS, msgspec.json.encode({"model": "echo", "prompt": ["a", 1]}), "prompt"),
    "token out of vocabulary": (COMPLETIONS, msgspec.json.encode({"model": "echo", "prompt": [99999]}), "prompt"),
    "too many choices": (COMPLETIONS, msgspec.json.encode({"model": "echo", "prompt": ["a"] * 100, "n": 128}), "n"),
}


@pytest.mark.parametrize(("path", "body", "param"), BODIES.values(), ids=BODIES)
async def test_bad_bodies(raw: RawClient, path: str, body: bytes, param: str | None) -> None:
    await raw.request("POST", path, body, content_type="application/json")
    error = error_of(await raw.answer(), 400)
    if param is not None:
        assert (error["param"] or "").startswith(param)
    assert len(error["message"]) < 1000
    await raw.request("POST", CHAT, chat_body("still here"))  # and the connection is as good as before
    assert (await raw.answer()).status == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", "", "%%%"])
async def test_wrong_content_type(raw: RawClient, content_type: str) -> None:
    await raw.request("POST", CHAT, chat_body("x"), content_type=content_type)
    assert error_of(await raw.answer(), 415)["code"] == "unsupported_media_type"


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "Application/JSON"])
async def test_right_content_type(raw: RawClient, content_type: str) -> None:
    await raw.request("POST", CHAT, chat_body("x"), content_type=content_type)
    assert (await raw.answer()).status == 200


async def test_unknown_paths_and_methods(raw: RawClient) -> None:
    await raw.request("GET", "/v1/nothing")
    assert error_of(await raw.answer(), 404)["code"] == "unknown_url"
    await raw.request("GET", CHAT)
    answer = await raw.answer()
    assert error_of(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"
    await raw.request("POST", CHAT, chat_body("x", model="nope" * 1000))
    error = error_of(await raw.answer(), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert len(error["message"]) < 300


async def test_unknown_models_make_no_series(running: RunningFrontend, raw: RawClient) -> None:
    for number in range(3):
        await raw.request("POST", CHAT, chat_body("x", model=f"guess-{number}"))
        await raw.answer()
    assert "guess" not in running.metrics()
    labels = {"endpoint": "chat_completions", "request_type": "unary", "status": "error", "error_type": "not_found"}
    assert running.sample("dynamo_frontend_requests_total", model="unknown_model", **labels) == 3


async def test_declared_50_mb_are_refused_unread(running: RunningFrontend, raw: RawClient) -> None:
    await raw.send(
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {50 * MIB}\r\n\r\n".encode()
    )
    assert error_of(await raw.answer(), 413)["code"] == "request_too_large"
    assert running.state.bodies.held == 0


async def test_expected_50_mb_are_refused_before_they_are_sent(raw: RawClient) -> None:
    fields = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {50 * MIB}\r\nExpect: 100-continue\r\n\r\n"
    await raw.send(f"POST {CHAT} HTTP/1.1\r\n{fields}".encode())
    error_of(await raw.answer(), 413)


@pytest.mark.parametrize("chunked", [False, True])
async def test_50_mb_are_refused_and_not_kept(models: FakeModels, chunked: bool) -> None:
    """The client sends all of it and still reads the answer; what is read after the refusal is thrown away."""
    block = b"x" * MIB
    async with (
        frontend(models, body_limit=2 * MIB, body_budget=4 * MIB) as running,
        RawClient(running.port, patience=20) as raw,
    ):
        size = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {50 * MIB}"
        tracemalloc.start()
        try:
            await raw.send(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{size}\r\n\r\n".encode())
            before = tracemalloc.get_traced_memory()[0]
            try:
                for _ in range(50):
                    await raw.send(b"%x\r\n%b\r\n" % (MIB, block) if chunked else block)
            except ConnectionError:
                pass  # it need not listen to the end
            error_of(await raw.answer(), 413)
            assert tracemalloc.get_traced_memory()[1] - before < 12 * MIB
        finally:
            tracemalloc.stop()
        assert running.state.bodies.held == 0


async def test_a_compression_bomb_is_refused(models: FakeModels) -> None:
    bomb = gzip.compress(b" " * (64 * MIB))
    async with frontend(models, body_limit=2 * MIB, body_budget=4 * MIB) as running, RawClient(running.port) as raw:
        await raw.request("POST", CHAT, bomb, content_encoding="gzip")
        error_of(await raw.answer(), 413)


async def test_a_compressed_body_is_read_and_a_broken_one_refused(raw: RawClient) -> None:
    await raw.request("POST", CHAT, gzip.compress(chat_body("small")), content_encoding="gzip")
    assert (await raw.answer()).json()["choices"][0]["message"]["content"] == "small"
    await raw.request("POST", CHAT, b"not gzip at all", content_encoding="gzip")
    error_of(await raw.answer(), 400)


async def test_the_body_budget_is_shared(models: FakeModels) -> None:
    half = b'{"model":"' + b"x" * (700 * 1024)
    async with frontend(models, body_limit=MIB, body_budget=MIB) as running:
        async with RawClient(running.port) as first, RawClient(running.port) as second:
            head = (
                f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {MIB}\r\n\r\n".encode()
            )
            await first.send(head + half)
            async with asyncio.timeout(5):
                while running.state.bodies.held < len(half):
                    await asyncio.sleep(0.001)
            await second.send(head + half)
            answer = await second.answer()
            assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
        await running.until_idle()
        assert running.state.bodies.held == 0


@pytest.mark.parametrize("beginning", [b"P", b"POST /v1/chat", b"POST /v1/models HTTP/1.1\r\nHost: x\r\nX-A: b"])
async def test_slow_headers_time_out(models: FakeModels, beginning: bytes) -> None:
    async with frontend(models, header_timeout=0.2) as running, RawClient(running.port) as raw:
        await raw.send(beginning)
        assert error_of(await raw.answer(), 408)["code"] == "request_timeout"
        assert await raw.read() == b""
        # Ended, not reset: the server listens a little longer, so that the answer is read.
        assert len(running.server._runner.server.connections) == 1  # type: ignore[union-attr]  # only tests ask


async def test_dripping_headers_time_out(models: FakeModels) -> None:
    async with frontend(models, header_timeout=0.2) as running, RawClient(running.port) as raw:
        await raw.request("GET", "/live")
        assert (await raw.answer()).status == 200
        await raw.send(b"GET /live HTTP/1.1\r\n")
        answer = asyncio.ensure_future(raw.answer())
        for number in range(40):
            if answer.done():
                break
            await raw.send(f"X-{number}: 1\r\n".encode())
            await asyncio.sleep(0.02)
        else:
            pytest.fail("every byte bought more time")
        error_of(await answer, 408)


async def test_slow_bodies_time_out(models: FakeModels, running: RunningFrontend) -> None:
    async with frontend(models, body_timeout=0.2, body_rate=10_000) as running, RawClient(running.port) as raw:
        await raw.send(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n".encode()
        )
        answer = asyncio.ensure_future(raw.answer())
        for _ in range(100):
            if answer.done():
                break
            await raw.send(b" ")
            await asyncio.sleep(0.02)
        else:
            pytest.fail("every byte bought more time")
        assert error_of(await answer, 408)["code"] == "request_timeout"
        await running.until_idle()


async def test_a_steady_upload_may_take_longer(models: FakeModels) -> None:
    body = chat_body("x" * 4000)
    async with frontend(models, body_timeout=0.2, body_rate=1_000) as running, RawClient(running.port) as raw:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        await raw.send(head.encode())
        for start in range(0, len(body), 250):
            await raw.send(body[start : start + 250])
            await asyncio.sleep(0.03)
        assert (await raw.answer()).status == 200


async def test_idle_connections_close(models: FakeModels) -> None:
    async with frontend(models, idle_timeout=0.1) as running, RawClient(running.port) as raw:
        assert await raw.read() == b""


HEADS = {
    "not http": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 hello\r\n\r\n", 400),
    "bad version": (b"GET /live HTTP/9.9\r\nHost: x\r\n\r\n", 400),
    "long field": (b"GET /live HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 200_000 + b"\r\n\r\n", 431),
    "long line": (b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 431),
    "bad length": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 400),
    "two lengths": (b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", 400),
    "length and chunked": (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "null in a field": (b"GET /live HTTP/1.1\r\nHost: x\r\nX-Null: a\x00b\r\n\r\n", 400),
    "space before colon": (b"GET /live HTTP/1.1\r\nHost : x\r\n\r\n", 400),
}


@pytest.mark.parametrize(("data", "status"), HEADS.values(), ids=HEADS)
async def test_bad_heads(raw: RawClient, data: bytes, status: int) -> None:
    await raw.send(data)
    error_of(await raw.answer(), status)
    try:
        assert await raw.read() == b""
    except ConnectionResetError:
        pass


async def test_too_many_headers(raw: RawClient) -> None:
    await raw.send(b"GET /live HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: 1\r\n" % n for n in range(5000)) + b"\r\n")
    assert (await raw.answer()).status in (400, 431)


async def test_many_fields_that_are_too_large_together(models: FakeModels) -> None:
    async with (
        frontend(models, head_limit=20_000, header_limit=16_000, header_timeout=5) as running,
        RawClient(running.port) as raw,
    ):
        await raw.request("GET", "/live", x_one="1" * 9_000, x_two="2" * 9_000)
        assert (await raw.answer()).status == 200
        await raw.send(b"GET /live HTTP/1.1\r\nHost: x\r\n")
        answer = asyncio.ensure_future(raw.answer())
        for number in range(100):
            if answer.done():
                break
            await raw.send(b"X-%d: %b\r\n" % (number, b"a" * 1000))
            await asyncio.sleep(0.01)
        else:
            pytest.fail("all of it was taken")
        assert number < 40
        assert error_of(await answer, 431)["code"] == "headers_too_large"
        assert await raw.read() == b""


async def test_a_connection_too_many_is_told_so(models: FakeModels) -> None:
    async with frontend(models, max_connections=2) as running:
        async with RawClient(running.port) as first, RawClient(running.port) as second:
            for raw in (first, second):
                await raw.request("GET", "/live")
                assert (await raw.answer()).status == 200
            async with RawClient(running.port) as third:
                answer = await third.answer()
                assert (answer.status, answer.json()["error"]["code"]) == (503, "overloaded")
                assert answer.headers["retry-after"] == "1"
                assert await third.read() == b""
            await first.request("GET", "/live")
            assert (await first.answer()).status == 200
        async with asyncio.timeout(5):
            while True:  # as soon as one is gone, there is room
                async with RawClient(running.port) as raw:
                    await raw.request("GET", "/live")
                    if (await raw.answer()).status == 200:
                        break


async def test_bad_chunks(raw: RawClient) -> None:
    await raw.send(
        f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    )
    await raw.send(b'5\r\n{"mod\r\nzz\r\n')
    error_of(await raw.answer(), 400)


async def test_pipelined_requests_are_answered_in_order(raw: RawClient) -> None:
    for text in ("one", "two", "three"):
        await raw.request("POST", CHAT, chat_body(text))
    answers = [(await raw.answer()).json()["choices"][0]["message"]["content"] for _ in range(3)]
    assert answers == ["one", "two", "three"]


async def test_large_prompts_do_not_stop_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large body is tokenised in another thread, a small one at once."""
    many = FakeModels(context_length=10 * MIB)
    threads: list[bool] = []
    encode = ByteTokenizer.encode

    def recorded(self: ByteTokenizer, text: str, *, special: bool = False) -> list[int]:
        threads.append(threading.current_thread() is threading.main_thread())
        return encode(self, text, special=special)

    monkeypatch.setattr(ByteTokenizer, "encode", recorded)

    async def counts(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=list(str(len(call.request.token_ids)).encode()), finish_reason="stop")]

    many.add("counts", FakeEngine(counts))
    async with frontend(many) as running, RawClient(running.port) as raw:
        for size in (100, 5_000_000):
            await raw.request("POST", CHAT, chat_body("x" * size, model="counts"))
            assert (await raw.answer()).json()["choices"][0]["message"]["content"] == str(size)
    assert threads == [True, False]
