"""Wrong keys by the thousand, and where right ones must not be found."""

import gc
import logging
import statistics
import tracemalloc
from pathlib import Path
from time import perf_counter

import pytest

from stator.config import Secret
from stator.frontend.key_file_edit import add_key
from stator.security.key_hashes import KeyIndex, hash_text, new_key, parse_hash
from stator.testing.fake_models import FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, RunningFrontend, chat_body, frontend

pytestmark = pytest.mark.timeout(120)

CHAT = "/v1/chat/completions"
KEY = "sk-0123456789abcdef-right"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "keys.toml"
    add_key(path, {"name": "team", "hash": hash_text(Secret(KEY)), "requests_per_minute": 100_000})
    return path


async def attempts(running: RunningFrontend, first: int, count: int) -> None:
    """So many requests with different wrong keys on one connection, some at a time."""
    async with RawClient(running.port) as raw:
        for begin in range(first, first + count, 20):
            await raw.send(
                b"".join(
                    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-wrong-%d\r\n\r\n" % number
                    for number in range(begin, begin + 20)
                )
            )
            for _ in range(20):
                assert (await raw.answer()).status == 401


@pytest.mark.load
async def test_wrong_keys_leave_nothing_behind(path: Path, models: FakeModels, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        async with frontend(models, api_keys_path=path) as running:
            caplog.clear()
            await attempts(running, 0, 1000)
            gc.collect()
            tracemalloc.start()
            try:
                before, _ = tracemalloc.get_traced_memory()
                await attempts(running, 1000, 10_000)
                gc.collect()
                after, _ = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            assert after - before < 200_000
            assert running.sample("stator_frontend_key_failures_total", reason="invalid") == 11_000
            lines = [record for record in caplog.records if record.levelno >= logging.INFO]
            assert 1 <= len(lines) <= 12  # one in ten seconds
            assert "sk-wrong" not in caplog.text


@pytest.mark.load
def test_wrong_keys_cost_the_same_whatever_they_share_with_a_right_one() -> None:
    keys = [new_key().reveal() for _ in range(1000)]
    index = KeyIndex((parse_hash(hash_text(Secret(key))), key) for key in keys)
    right = keys[500]
    kinds = {
        "right": right,
        "its last digit is wrong": right[:-1] + ("0" if right[-1] != "0" else "1"),
        "its first digit is wrong": "sk-" + ("0" if right[3] != "0" else "1") + right[4:],
        "nothing is right": "sk-" + "z" * 64,
    }
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(300):
        for kind, key in kinds.items():
            begin = perf_counter()
            for _ in range(20):
                index.find(key)
            times[kind].append(perf_counter() - begin)
    medians = [statistics.median(each) for each in times.values()]
    assert max(medians) < 1.5 * min(medians)


async def test_keys_are_in_no_line_of_the_log_and_no_answer(
    path: Path, models: FakeModels, caplog: pytest.LogCaptureFixture
) -> None:
    marks = ("0123456789abcdef", "wr0ngwr0ng")
    headers = [f"Authorization: Bearer {KEY}", "Authorization: Bearer sk-wr0ngwr0ng", "api-key: sk-wr0ngwr0ng"]
    body = chat_body("hello")
    answers = b""
    with caplog.at_level(logging.DEBUG):
        async with frontend(models, api_keys_path=path) as running:
            running.state.log.refresh()
            for header in headers:
                for line in (f"POST {CHAT}", "GET /v1/models", "POST /v1/nowhere", "GET /metrics", "POST /v1/models"):
                    head = f"{line} HTTP/1.1\r\nHost: x\r\n{header}\r\nConnection: close\r\nContent-Type: application/json\r\n"
                    async with RawClient(running.port) as raw:
                        await raw.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                        while data := await raw.read():
                            answers += data
            for broken in (f"Authorization Bearer {KEY}\r\n", f"Authorization: Bearer {KEY}\0\r\n", f"{KEY}\r\n"):
                async with RawClient(running.port) as raw:
                    await raw.send(f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{broken}\r\n".encode())
                    assert b" 400 " in await raw.read()
            async with RawClient(running.port) as raw:  # one that fails with a traceback
                models.add("bug", FakeEngine(None))  # type: ignore[arg-type]  # that is the bug
                await raw.request("POST", CHAT, chat_body("x", model="bug"), authorization=f"Bearer {KEY}")
                assert (await raw.answer()).status == 500
            await running.until_logged()
            keys = running.state.keys
            assert keys is not None
            account = keys.account_of({"api-key": KEY}, "")
            shown = " ".join(map(repr, (keys, account, account.record, keys._index, running.state, *vars(keys).values())))
            page = running.metrics()
    assert "http request completed" in caplog.text
    assert "Traceback" in caplog.text
    told = caplog.text + "".join(str(vars(record)) for record in caplog.records)
    for mark in marks:
        assert mark not in told
        assert mark not in shown
        assert mark not in page
        assert mark.encode() not in answers
    digest = hash_text(Secret(KEY)).removeprefix("sha256:")
    assert digest not in told + page
