"""Callbacks under /engine: the bodies of `spec/25 §5.1`."""

import asyncio
from typing import Any

import pytest

from stator.errors import UsageError
from stator.health import EngineRoutes

pytestmark = pytest.mark.timeout(10)


async def echo(value: Any) -> Any:
    return {"got": value}


@pytest.mark.parametrize(
    ("body", "answer"),
    [
        (b"", b'{"got":{}}'),
        (b"{}", b'{"got":{}}'),
        (b'{"a":[1,null]}', b'{"got":{"a":[1,null]}}'),
        (b"3", b'{"got":3}'),
        (b"null", b'{"got":null}'),
        (b' "text" ', b'{"got":"text"}'),
    ],
)
async def test_any_json_is_passed_on(body: bytes, answer: bytes) -> None:
    routes = EngineRoutes()
    routes.register("control/profile", echo)
    assert await routes.handle("control/profile", body) == (200, answer)


@pytest.mark.parametrize("body", [b"nope", b"{", b" ", b"\xff", b'"\xff"', b"[" * 100_000])
async def test_what_is_no_json(body: bytes) -> None:
    routes = EngineRoutes()
    routes.register("a", echo)
    status, text = await routes.handle("a", body)
    assert status == 400
    assert text.startswith(b'{"error":"Invalid JSON","message":"')


async def test_what_a_callback_raises(caplog: pytest.LogCaptureFixture) -> None:
    async def fail(value: Any) -> Any:
        raise ValueError("nope")

    async def leave(value: Any) -> Any:
        raise SystemExit(1)

    async def mute(value: Any) -> Any:
        return object()

    routes = EngineRoutes()
    routes.register("fail", fail)
    routes.register("leave", leave)
    routes.register("mute", mute)
    expected = b'{"error":"Handler error","message":"Python callback failed: ValueError: nope"}'
    assert await routes.handle("fail", b"") == (500, expected)
    assert "/engine/fail failed" in caplog.text
    for name in ("leave", "mute"):
        status, text = await routes.handle(name, b"")
        assert status == 500
        assert text.startswith(b'{"error":"Handler error","message":"Python callback failed: ')


async def test_a_name_is_what_it_is() -> None:
    routes = EngineRoutes()
    routes.register("control/x", echo)
    for name in ("control/nope", "control/x/", "control", "Control/x"):
        expected = f'{{"error":"Route not found","message":"Route /engine/{name} not found"}}'.encode()
        assert await routes.handle(name, b"nope") == (404, expected)
    routes.register("/update/y", echo)
    assert routes.names == ["control/x", "update/y"]
    routes.unregister("control/x")
    routes.unregister("control/x")
    assert (await routes.handle("control/x", b""))[0] == 404
    for name in ("", "/"):
        with pytest.raises(UsageError, match="name"):
            routes.register(name, echo)


async def test_cancelling_reaches_the_callback() -> None:
    async def wait(value: Any) -> Any:
        await asyncio.Event().wait()

    routes = EngineRoutes()
    routes.register("wait", wait)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(routes.handle("wait", b""), 0.01)
