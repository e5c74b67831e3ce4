"""The file of keys changes while requests run."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import pytest

from stator.config import Secret
from stator.frontend.key_file_edit import add_key, remove_key
from stator.llm.output import EngineOutput
from stator.security.key_hashes import hash_text
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, RunningFrontend, chat_body, frontend

pytestmark = pytest.mark.timeout(60)

CHAT = "/v1/chat/completions"
KEYS = {"one": "sk-one-1111", "two": "sk-two-2222"}


def add(path: Path, name: str, **fields: int) -> None:
    add_key(path, {"name": name, "hash": hash_text(Secret(KEYS[name])), **fields})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    add(path, "one")
    return path


async def status(running: RunningFrontend, name: str) -> int:
    async with RawClient(running.port) as raw:
        await raw.request("POST", CHAT, chat_body("x"), authorization=f"Bearer {KEYS[name]}")
        return (await raw.answer()).status


async def until(condition: Callable[[], bool], seconds: float = 5.0) -> float:
    """How long it took."""
    loop = asyncio.get_running_loop()
    begin = loop.time()
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
    return loop.time() - begin


def reloads(running: RunningFrontend, outcome: str = "ok") -> float:
    return running.sample("stator_frontend_key_reloads_total", outcome=outcome)


async def test_keys_come_and_go_while_requests_stream(path: Path, models: FakeModels) -> None:
    ticks = asyncio.Event()

    async def slow(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[97])]
        await ticks.wait()
        yield [EngineOutput(token_ids=[98], finish_reason="stop")]

    models.add("slow", FakeEngine(slow))
    async with frontend(models, api_keys_path=path) as running, RawClient(running.port) as raw:
        await raw.request("POST", CHAT, chat_body("x", model="slow", stream=True), authorization=f"Bearer {KEYS['one']}")
        await raw.read_until(b'"a"')
        assert await status(running, "two") == 401
        await asyncio.to_thread(add, path, "two")
        assert await until(lambda: reloads(running) == 1) < 1.5
        assert await status(running, "two") == 200
        await asyncio.to_thread(remove_key, path, "one")
        await until(lambda: reloads(running) == 2)
        assert await status(running, "one") == 401
        ticks.set()  # what runs goes on to its end
        assert b'"b"' in await raw.read_until(b"[DONE]")
        await running.until_idle()
        assert 'key="one"' not in running.metrics()


async def test_limits_change_and_what_was_used_stays(path: Path, models: FakeModels) -> None:
    async with frontend(models, api_keys_path=path) as running:
        assert await status(running, "one") == 200
        text = await asyncio.to_thread(path.read_text)
        await asyncio.to_thread(path.write_text, text + "requests_per_minute = 1\n")
        await until(lambda: reloads(running) == 1)
        assert [await status(running, "one") for _ in range(2)] == [200, 429]
        await asyncio.to_thread(path.write_text, text + "requests_per_minute = 2\n")
        await until(lambda: reloads(running) == 2)
        assert [await status(running, "one") for _ in range(2)] == [200, 429]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "line 1: the file is empty"),
        ('[[keys]]\nname = "two"\nhash = "sha256:12', "(3 lines) is not valid TOML: "),
        ('[[keys]]\nname = "two"\nhash = "sha256:{}"\nrpm = 5\n'.format("0" * 64), "line 4"),
    ],
)
async def test_a_broken_file_keeps_the_old_keys_and_is_told_once(
    path: Path, models: FakeModels, caplog: pytest.LogCaptureFixture, text: str, expected: str
) -> None:
    async with frontend(models, api_keys_path=path) as running:
        good = await asyncio.to_thread(path.read_text)
        with caplog.at_level(logging.WARNING, "stator"):
            await asyncio.to_thread(path.write_text, text)
            await until(lambda: reloads(running, "failed") == 1)
            await asyncio.sleep(1.0)  # two more looks
            (record,) = caplog.records
            assert expected in record.getMessage()
            assert "stay in force" in record.getMessage()
        assert reloads(running, "failed") == 1
        assert await status(running, "one") == 200
        await asyncio.to_thread(path.write_text, good + "# repaired\n")
        await until(lambda: reloads(running) == 1)
        assert await status(running, "one") == 200


async def test_a_file_that_is_gone_for_a_while(path: Path, models: FakeModels) -> None:
    async with frontend(models, api_keys_path=path) as running:
        good = await asyncio.to_thread(path.read_text)
        await asyncio.to_thread(path.unlink)
        await until(lambda: reloads(running, "failed") == 1)
        assert await status(running, "one") == 200
        await asyncio.to_thread(path.write_text, good)
        await until(lambda: reloads(running) == 1)


async def test_a_link_that_is_moved(tmp_path: Path, models: FakeModels) -> None:
    """As Kubernetes changes what it mounts."""
    for name in KEYS:
        await asyncio.to_thread(add, tmp_path / f"{name}.toml", name)
    link, new = tmp_path / "keys.toml", tmp_path / "new"
    link.symlink_to(tmp_path / "one.toml")
    async with frontend(models, api_keys_path=link) as running:
        assert [await status(running, name) for name in KEYS] == [200, 401]
        new.symlink_to(tmp_path / "two.toml")
        await asyncio.to_thread(new.rename, link)
        await until(lambda: reloads(running) == 1)
        assert [await status(running, name) for name in KEYS] == [401, 200]


async def test_a_file_that_others_may_read_is_warned_of(
    path: Path, models: FakeModels, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "stator"):
        async with frontend(models, api_keys_path=path) as running:
            assert not caplog.records
            await asyncio.to_thread(path.chmod, 0o644)
            await until(lambda: len(caplog.records) == 1)
            assert "mode 0644" in caplog.text
            await asyncio.to_thread(add, path, "two")  # which shuts it, except for the group
            await until(lambda: reloads(running) == 2)
    assert len(caplog.records) == 1
