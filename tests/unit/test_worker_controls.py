"""An engine's commands: which of them take the endpoint out of discovery, and when it comes back."""

import asyncio
from typing import Any

import msgspec
import pytest

from stator.errors import Unavailable
from stator.health import EngineRoutes
from stator.testing.worker_host import FakeServed
from stator.worker.controls import PAUSING, RESUMING, EngineCommands

pytestmark = pytest.mark.timeout(10)


class Stage:
    """Commands that note in one log with the endpoint."""

    def __init__(self, *names: str, updates: tuple[str, ...] = ()) -> None:
        self.log: list[str] = []
        self.answers: dict[str, Any] = {}
        self.routes = EngineRoutes()
        self.served = FakeServed(self.log, lambda request, context: iter(()), {})  # type: ignore[arg-type, return-value]
        self.commands = EngineCommands(
            self.routes, {name: self.command(name) for name in names}, {name: self.command(name) for name in updates}
        )
        self.commands.offer(self.served)

    def command(self, name: str) -> Any:
        async def run(body: Any) -> Any:
            self.log.append(f"{name} {body}")
            answer = self.answers.get(name, {"status": "ok"})
            if isinstance(answer, Exception):
                raise answer
            return answer

        return run

    async def call(self, route: str, body: bytes = b"") -> tuple[int, Any]:
        status, text = await self.routes.handle(route, body)
        return status, msgspec.json.decode(text)


@pytest.mark.parametrize("name", sorted(PAUSING))
async def test_a_pause_takes_the_endpoint_out_first(name: str) -> None:
    stage = Stage(name)
    assert await stage.call(f"control/{name}", b'{"level":1}') == (200, {"status": "ok"})
    assert stage.log == ["unregister", f"{name} {{'level': 1}}"]


@pytest.mark.parametrize("name", sorted(RESUMING))
async def test_a_resumption_brings_it_back_afterwards(name: str) -> None:
    stage = Stage(name)
    await stage.call(f"control/{name}")
    assert stage.log == [f"{name} {{}}", "register"]


@pytest.mark.parametrize(
    ("answer", "back"),
    [
        ({"status": "error", "message": "no"}, False),
        ({"success": False}, False),
        ({"success": True}, True),
        ({"status": "ok", "success": None}, True),
        ({}, True),
        (None, True),
        ([1], True),
        (RuntimeError("no"), False),
    ],
)
async def test_it_comes_back_only_if_the_resumption_succeeded(answer: Any, back: bool) -> None:
    stage = Stage("wake_up")
    stage.answers["wake_up"] = answer
    status, _ = await stage.call("control/wake_up")
    assert status == (500 if isinstance(answer, Exception) else 200)
    assert ("register" in stage.log) is back


async def test_a_pause_that_fails_leaves_it_out() -> None:
    stage = Stage("sleep")
    stage.answers["sleep"] = RuntimeError("half way")
    status, said = await stage.call("control/sleep")
    assert (status, said["error"]) == (500, "Handler error")
    assert stage.log == ["unregister", "sleep {}"]


async def test_an_engine_is_not_paused_while_discovery_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def away(self: FakeServed) -> None:
        raise Unavailable("discovery is away")

    monkeypatch.setattr(FakeServed, "unregister", away)
    stage = Stage("sleep")
    status, said = await stage.call("control/sleep")
    assert status == 500
    assert "discovery is away" in said["message"]
    assert stage.log == []


async def test_other_controls_and_updates_are_called_and_nothing_else() -> None:
    stage = Stage("start_profile", updates=("sleep",))
    await stage.call("control/start_profile", b"[1]")
    await stage.call("update/sleep", b"2")
    assert stage.log == ["start_profile [1]", "sleep 2"]
    assert (await stage.call("control/nope"))[0] == 404


async def test_pause_and_resumption_take_turns() -> None:
    stage = Stage("sleep", "wake_up")
    asleep = asyncio.Event()
    stage.commands.withdraw()

    async def slow(body: Any) -> Any:
        stage.log.append("falls asleep")
        await asleep.wait()
        stage.log.append("sleeps")

    commands = EngineCommands(stage.routes, {"sleep": slow, "wake_up": stage.command("wake_up")}, {})
    commands.offer(stage.served)
    sleeping = asyncio.ensure_future(stage.call("control/sleep"))
    await asyncio.sleep(0)
    waking = asyncio.ensure_future(stage.call("control/wake_up"))
    await asyncio.sleep(0.01)
    asleep.set()
    await asyncio.gather(sleeping, waking)
    assert stage.log == ["unregister", "falls asleep", "sleeps", "wake_up {}", "register"]


async def test_a_worker_that_leaves_is_not_brought_back() -> None:
    stage = Stage("wake_up")
    waiting = asyncio.Event()

    async def slow(body: Any) -> Any:
        await waiting.wait()

    commands = EngineCommands(stage.routes, {"wake_up": slow}, {})
    commands.offer(stage.served)
    waking = asyncio.ensure_future(stage.call("control/wake_up"))
    await asyncio.sleep(0)
    commands.withdraw()
    waiting.set()
    await waking
    assert "register" not in stage.log
    assert stage.routes.names == []
    assert (await stage.call("control/wake_up"))[0] == 404
