"""Bodies nobody thought of: every answer is complete, JSON, and no 5xx."""

import asyncio
import http.client
import threading
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stator.llm.openai import ChatRequest, CompletionRequest
from stator.testing.fake_models import FakeEngine, FakeModels
from stator.testing.frontend_kit import frontend

pytestmark = pytest.mark.timeout(120)

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A frontend with an event loop in a thread of its own."""
    started: threading.Event = threading.Event()
    found: list[tuple[int, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        models, end = FakeModels(), asyncio.Event()
        models.add("echo", FakeEngine())
        async with frontend(models) as running:
            found.append((running.port, asyncio.get_running_loop(), end))
            started.set()
            await end.wait()

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert started.wait(10)
    port, loop, end = found[0]
    yield port
    loop.call_soon_threadsafe(end.set)
    thread.join(10)
    assert not thread.is_alive()


def post(port: int, path: str, body: bytes) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read()
    finally:
        connection.close()


def check(port: int, path: str, body: bytes) -> None:
    status, content_type, answer = post(port, path, body)
    assert status == 200 or 400 <= status < 500, (status, answer, body)
    if content_type == "text/event-stream":
        assert answer.endswith(b"data: [DONE]\n\n")
        assert b'"error":' not in answer
        return
    value = msgspec.json.decode(answer)
    if status != 200:
        assert set(value) == {"error"}
        assert set(value["error"]) == {"message", "type", "param", "code"}
        assert len(value["error"]["message"]) < 2000


SETTINGS = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12
)
NUMBERS = st.sampled_from([0, 1, -1, 2, 3, 0.5, 1e308, -1e308, 2**31, 2**32, 2**63 - 1, -(2**63), 2**64, 10**40])


def fields(kind: type[msgspec.Struct]) -> list[str]:
    # Many choices are slow and tested elsewhere.
    return [field.encode_name for field in msgspec.structs.fields(kind) if field.encode_name not in ("n", "best_of")]


def bodies(kind: type[msgspec.Struct], valid: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """A valid body with some fields added, changed or removed."""
    changes = st.dictionaries(st.sampled_from(fields(kind)), ANYTHING | NUMBERS, max_size=3)
    removed = st.sets(st.sampled_from(sorted(valid)), max_size=1)
    return st.builds(
        lambda changes, removed: msgspec.json.encode({k: v for k, v in {**valid, **changes}.items() if k not in removed}),
        changes,
        removed,
    )


MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "tool", "developer", "x"])},
        optional={
            "content": ANYTHING
            | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image_url"])}, optional={"text": SCALARS})),
            "name": SCALARS,
            "tool_calls": ANYTHING,
        },
    ),
    max_size=4,
)


@SETTINGS
@given(body=st.binary(max_size=200))
def test_any_bytes(port: int, body: bytes) -> None:
    check(port, CHAT, body)


@SETTINGS
@given(value=ANYTHING)
def test_any_json(port: int, value: Any) -> None:
    check(port, COMPLETIONS, msgspec.json.encode(value))


@SETTINGS
@given(body=bodies(ChatRequest, {"model": "echo", "messages": [{"role": "user", "content": "hi"}], "stream": True}))
def test_changed_chat_bodies(port: int, body: bytes) -> None:
    check(port, CHAT, body)


@SETTINGS
@given(body=bodies(CompletionRequest, {"model": "echo", "prompt": "hi", "stream": True}))
def test_changed_completion_bodies(port: int, body: bytes) -> None:
    check(port, COMPLETIONS, body)


@SETTINGS
@given(messages=MESSAGES, stream=st.booleans())
def test_messages(port: int, messages: list[dict[str, Any]], stream: bool) -> None:
    check(port, CHAT, msgspec.json.encode({"model": "echo", "messages": messages, "stream": stream}))


@SETTINGS
@given(text=st.text(min_size=1, max_size=300))
def test_any_text_comes_back(port: int, text: str) -> None:
    body = msgspec.json.encode({"model": "echo", "messages": [{"role": "user", "content": text}]})
    status, _, answer = post(port, CHAT, body)
    assert status == 200, answer
    assert msgspec.json.decode(answer)["choices"][0]["message"]["content"] == text
    status, _, answer = post(port, CHAT, msgspec.json.encode({**msgspec.json.decode(body), "stream": True}))
    events = [
        msgspec.json.decode(line.removeprefix(b"data: ")) for line in answer.split(b"\n\n") if line.startswith(b"data: {")
    ]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == text
