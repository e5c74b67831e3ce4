"""API keys as clients meet them: the official client, the routes, the limits."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from stator.config import Secret
from stator.errors import ConfigError, Overloaded
from stator.frontend import doors
from stator.llm.output import EngineOutput
from stator.security.key_hashes import hash_text
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, RunningFrontend, chat_body, events_of, frontend

pytestmark = pytest.mark.timeout(60)

CHAT = "/v1/chat/completions"
KEY = "sk-of-the-team"
ADMIN = "sk-of-the-operator"


class Keys:
    """A file of keys."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, name: str, key: str, **fields: object) -> None:
        fields = {"name": name, "hash": hash_text(Secret(key)), **fields}
        with self.path.open("a") as file:
            file.write("\n".join(["[[keys]]", *(f"{field} = {json.dumps(value)}" for field, value in fields.items()), ""]))


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.toml")


@pytest.fixture
async def models() -> FakeModels:
    models = FakeModels()
    models.add("echo", FakeEngine())
    models.add("other", FakeEngine())
    return models


@pytest.fixture
async def team(keys: Keys, models: FakeModels) -> AsyncIterator[RunningFrontend]:
    """A frontend with one key for one model."""
    keys.add("team", KEY, models=["echo"])
    async with frontend(models, api_keys_path=keys.path) as running:
        yield running


def client(running: RunningFrontend, key: str = KEY, retries: int = 0) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key=key, max_retries=retries, timeout=10)


async def ask(one: openai.AsyncOpenAI, text: str = "hello", **more: Any) -> str | None:
    answer = await one.chat.completions.create(**{"model": "echo", "messages": [{"role": "user", "content": text}], **more})
    return answer.choices[0].message.content


async def test_a_key_opens_the_door(team: RunningFrontend) -> None:
    async with client(team) as good:
        assert await ask(good) == "hello"
        assert [model.id for model in (await good.models.list()).data] == ["echo"]
        assert (await good.models.retrieve("echo")).id == "echo"
        stream = await good.chat.completions.create(model="echo", messages=[{"role": "user", "content": "abc"}], stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "abc"
    assert team.sample("stator_frontend_key_requests_total", key="team") == 2
    assert team.sample("stator_frontend_key_tokens_total", key="team", kind="completion") == 8
    prompts = team.sample("stator_frontend_key_tokens_total", key="team", kind="prompt")
    assert prompts == team.sample("dynamo_frontend_input_sequence_tokens_sum", model="echo")


async def test_a_wrong_key_does_not(team: RunningFrontend) -> None:
    async with client(team, "sk-wrong") as wrong:
        for attempt in (ask(wrong), wrong.models.list(), wrong.models.retrieve("echo")):
            with pytest.raises(openai.AuthenticationError) as raised:
                await attempt
            assert raised.value.code == "invalid_api_key"
            assert "wrong" not in str(raised.value)
    assert team.sample("stator_frontend_key_failures_total", reason="invalid") == 3
    assert team.sample("stator_frontend_key_requests_total", key="team") == 0


async def test_no_key_does_not_either(team: RunningFrontend) -> None:
    async with RawClient(team.port) as raw:
        await raw.request("POST", CHAT, chat_body("x"))
        answer = await raw.answer()
    assert answer.status == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "missing_api_key")


async def test_another_model_is_forbidden_whether_it_exists_or_not(team: RunningFrontend, models: FakeModels) -> None:
    async with client(team) as good:
        for model in ("other", "nobody"):
            with pytest.raises(openai.PermissionDeniedError) as raised:
                await ask(good, model=model)
            assert (raised.value.code, raised.value.param) == ("model_not_allowed", "model")
            with pytest.raises(openai.PermissionDeniedError):
                await good.models.retrieve(model)
    assert not models.get("other").engine.calls  # type: ignore[union-attr]  # a fake one
    assert team.sample("stator_frontend_key_refusals_total", key="team", reason="model") == 4


async def test_an_expired_key_says_so(keys: Keys, models: FakeModels) -> None:
    text = f'[[keys]]\nname = "old"\nhash = "{hash_text(Secret(KEY))}"\nexpires = 2020-01-01\n'
    keys.path.write_text(text)
    async with frontend(models, api_keys_path=keys.path) as running, client(running) as old:
        with pytest.raises(openai.AuthenticationError) as raised:
            await ask(old)
        assert raised.value.code == "expired_api_key"


async def test_too_many_requests_are_told_when_to_come_back(keys: Keys, models: FakeModels) -> None:
    keys.add("team", KEY, requests_per_minute=2)
    async with frontend(models, api_keys_path=keys.path) as running, client(running) as good:
        first = await good.chat.completions.with_raw_response.create(model="echo", messages=[{"role": "user", "content": "x"}])
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"].endswith("s")
        stream = await good.chat.completions.with_raw_response.create(
            model="echo", messages=[{"role": "user", "content": "x"}], stream=True
        )
        assert stream.headers["x-ratelimit-remaining-requests"] == "0"
        async for _ in stream.parse():
            pass
        with pytest.raises(openai.RateLimitError) as raised:
            await ask(good)
        error = raised.value
        assert (error.code, error.type) == ("rate_limit_exceeded", "requests")
        assert 28 <= int(error.response.headers["retry-after"]) <= 30
        assert 28_000 <= int(error.response.headers["retry-after-ms"]) <= 30_001
        assert error.response.headers["x-ratelimit-remaining-requests"] == "0"
        assert running.sample("stator_frontend_key_refusals_total", key="team", reason="requests") == 1


async def test_the_official_client_waits_as_long_as_it_is_told(keys: Keys, models: FakeModels) -> None:
    keys.add("team", KEY, requests_per_minute=120)
    async with frontend(models, api_keys_path=keys.path) as running, client(running, retries=2) as patient:
        now = running.state.clock.monotonic
        account = running.state.keys.account_of({"api-key": KEY}, "")  # type: ignore[union-attr]  # there are keys
        account.requests.charge(120, now())  # type: ignore[union-attr]  # there is a limit
        begin = now()
        assert await ask(patient) == "hello"
        assert 0.4 <= now() - begin <= 5


async def test_tokens_are_limited_by_what_was_used(keys: Keys, models: FakeModels) -> None:
    keys.add("team", KEY, tokens_per_minute=100)
    async with frontend(models, api_keys_path=keys.path) as running, client(running) as good:
        assert await ask(good, "x" * 70) == "x" * 70  # 70 and a few before, 70 after: overdrawn
        with pytest.raises(openai.RateLimitError) as raised:
            await ask(good, "y")
        assert raised.value.type == "tokens"
        assert 15 <= int(raised.value.response.headers["retry-after"]) <= 60
        assert raised.value.response.headers["x-ratelimit-remaining-tokens"] == "0"
        assert running.sample("stator_frontend_key_refusals_total", key="team", reason="tokens") == 1
        labels = {"model": "echo", "endpoint": "chat_completions", "request_type": "unary"}
        assert running.sample("dynamo_frontend_requests_total", **labels, status="success", error_type="") == 1


async def test_a_prompt_that_never_fits_is_not_tried_again(keys: Keys, models: FakeModels) -> None:
    keys.add("team", KEY, tokens_per_minute=100)
    async with frontend(models, api_keys_path=keys.path) as running, client(running, retries=2) as good:
        with pytest.raises(openai.RateLimitError) as raised:
            await ask(good, "x" * 200)
        assert "more than the limit ever allows" in str(raised.value)
        assert raised.value.response.headers["x-should-retry"] == "false"
        assert "retry-after" not in raised.value.response.headers
        labels = {"model": "echo", "endpoint": "chat_completions", "request_type": "unary", "status": "error"}
        assert running.sample("dynamo_frontend_requests_total", **labels, error_type="rate_limit") == 1
        assert await ask(good, "short") == "short"  # what was refused cost nothing


class Held:
    """A model that sends one token and waits for the test."""

    def __init__(self, models: FakeModels) -> None:
        self.go_on = asyncio.Event()
        self.engine = models.add("held", FakeEngine(self.script))

    async def script(self, call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[97])]
        await self.go_on.wait()
        yield [EngineOutput(token_ids=[98], finish_reason="stop")]


async def test_requests_at_one_time(keys: Keys, models: FakeModels) -> None:
    keys.add("team", KEY, concurrent_requests=1)
    keys.add("other", "sk-other", concurrent_requests=1)
    held = Held(models)
    async with (
        frontend(models, api_keys_path=keys.path) as running,
        client(running) as good,
        client(running, "sk-other") as other,
        RawClient(running.port) as raw,
    ):
        await raw.request("POST", CHAT, chat_body("x", model="held", stream=True), authorization=f"Bearer {KEY}")
        await raw.read_until(b'"a"')
        with pytest.raises(openai.RateLimitError) as raised:
            await ask(good)
        assert raised.value.response.headers["retry-after"] == "1"
        assert await ask(other) == "hello"
        held.go_on.set()
        await raw.read_until(b"[DONE]")
        await running.until_idle()
        assert await ask(good) == "hello"
        raw.writer.close()


async def test_a_client_that_leaves_gives_its_place_back(keys: Keys, models: FakeModels) -> None:
    keys.add("team", KEY, concurrent_requests=1)
    Held(models)
    async with frontend(models, api_keys_path=keys.path) as running, client(running) as good:
        async with RawClient(running.port) as raw:
            await raw.request("POST", CHAT, chat_body("x", model="held", stream=True), authorization=f"Bearer {KEY}")
            await raw.read_until(b'"a"')
        await running.until_idle()
        assert await ask(good) == "hello"


async def test_what_workers_refuse_costs_nothing(keys: Keys, models: FakeModels) -> None:
    keys.add("team", KEY, requests_per_minute=1)
    engine = models.add("full", FakeEngine(refusal=Overloaded("full"), places=1))
    async with frontend(models, api_keys_path=keys.path, queue=0) as running, client(running) as good:
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                await ask(good, model="full")
        engine.refusal = None
        assert await ask(good, model="full") == "hello"
        with pytest.raises(openai.RateLimitError):
            await ask(good, model="full")


@pytest.mark.parametrize("path", ["/health", "/live", "/metrics", "/nowhere", "/busy_threshold"])
async def test_routes_that_need_no_key_on_this_machine(team: RunningFrontend, path: str) -> None:
    async with RawClient(team.port) as raw:
        await raw.request("GET", path)
        assert (await raw.answer()).status == (404 if path in ("/nowhere", "/busy_threshold") else 200)


@pytest.mark.parametrize("path", ["/v1/models", "/%76%31/models", "/v1/nowhere", "/v1/models/x%2fy", "/v1/models/../models"])
async def test_no_spelling_leads_round_the_door(team: RunningFrontend, path: str) -> None:
    async with RawClient(team.port) as raw:
        await raw.request("GET", path)
        answer = await raw.answer()
    assert (answer.status, answer.json()["error"]["code"]) == (401, "missing_api_key")


async def test_operators_elsewhere_need_a_key_of_theirs(
    keys: Keys, models: FakeModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.add("team", KEY)
    keys.add("operator", ADMIN, admin=True)
    monkeypatch.setattr(doors, "is_local", lambda request: False)
    async with frontend(models, api_keys_path=keys.path) as running:
        for path in ("/metrics", "/nowhere"):
            for key, expected in (("", 401), ("wrong", 401), (KEY, 403), (ADMIN, 200 if path == "/metrics" else 404)):
                async with RawClient(running.port) as raw:
                    await raw.request("GET", path, authorization=f"Bearer {key}")
                    assert (await raw.answer()).status == expected, (path, key)
        for path in ("/health", "/live"):
            async with RawClient(running.port) as raw:
                await raw.request("GET", path)
                assert (await raw.answer()).status == 200
        assert running.sample("stator_frontend_key_refusals_total", key="team", reason="admin") == 2


async def test_a_wrong_key_is_refused_before_the_body(team: RunningFrontend) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer no\r\n"
    for more in ("Content-Length: 40000000\r\n\r\n", "Content-Length: 40000000\r\nExpect: 100-continue\r\n\r\n"):
        async with RawClient(team.port) as raw:
            await raw.send((head + more).encode())
            answer = await raw.answer()
            assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert team.state.bodies.held == 0


async def test_the_tenant_of_the_queue_and_of_the_log_is_the_key(
    keys: Keys, models: FakeModels, caplog: pytest.LogCaptureFixture
) -> None:
    keys.add("team", KEY, priorities=["low", "normal"])
    engine = models.add("one", FakeEngine(places=1))
    held = Held(models)
    engine.script = held.script
    async with (
        frontend(models, api_keys_path=keys.path, queue_wait=10, queue_target=0) as running,
        RawClient(running.port) as first,
        RawClient(running.port) as second,
        client(running) as good,
    ):
        with caplog.at_level("INFO", "stator.request"):
            running.state.log.refresh()
            for raw in (first, second):
                await raw.request("POST", CHAT, chat_body("x", model="one", stream=True), authorization=f"Bearer {KEY}")
            await first.read_until(b'"a"')
            async with asyncio.timeout(5):
                while not running.sample("stator_frontend_waiting_calls", model="one", priority="low"):
                    await asyncio.sleep(0.01)
            with pytest.raises(openai.PermissionDeniedError) as raised:
                await ask(good, extra_headers={"x-stator-priority": "high"})
            assert raised.value.code == "priority_not_allowed"
            (gate,) = (gate for _, gate in running.state.admissions._gates.values() if gate.model == "one")
            assert {permit.group.tenant for permit in gate.queue.all_waiting()} == {"team"}
            held.go_on.set()
            for raw in (first, second):
                await raw.read_until(b"[DONE]")
            await running.until_idle()
            await running.until_logged()
    assert [vars(line).get("key") for line in caplog.records if line.name == "stator.request"] == ["team"] * 3


async def test_shares(keys: Keys, models: FakeModels) -> None:
    keys.add("team", KEY, requests_per_minute=4)
    async with frontend(models, api_keys_path=keys.path, api_key_shares=2) as running, client(running) as good:
        assert [await ask(good, text) for text in ("a", "b")] == ["a", "b"]
        with pytest.raises(openai.RateLimitError, match="each of 2 frontends"):
            await ask(good)


async def test_errors_in_mid_stream_count_what_came(keys: Keys, models: FakeModels) -> None:
    async def breaks(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
        yield [EngineOutput(token_ids=[97, 98, 99])]
        raise Overloaded("too late")

    models.add("breaks", FakeEngine(breaks))
    keys.add("team", KEY, requests_per_minute=1)
    async with frontend(models, api_keys_path=keys.path) as running, RawClient(running.port) as raw:
        await raw.request("POST", CHAT, chat_body("x", model="breaks", stream=True), authorization=f"Bearer {KEY}")
        answer = await raw.answer()
        assert "error" in events_of(answer.body)[-1]
        assert running.sample("stator_frontend_key_tokens_total", key="team", kind="completion") == 3
        await raw.request("POST", CHAT, chat_body("x"), authorization=f"Bearer {KEY}")
        assert (await raw.answer()).status == 429


async def test_without_a_file_nobody_is_asked(models: FakeModels) -> None:
    async with frontend(models) as running, client(running, "anything") as anybody:
        response = await anybody.chat.completions.with_raw_response.create(
            model="echo", messages=[{"role": "user", "content": "x"}]
        )
        assert not [name for name in response.headers if name.startswith("x-ratelimit")]
        assert "stator_frontend_key" not in running.metrics()


@pytest.mark.parametrize("text", [None, "", "[[keys]]\nname = 5\n"])
async def test_a_frontend_does_not_start_without_its_keys(tmp_path: Path, models: FakeModels, text: str | None) -> None:
    path = tmp_path / "keys.toml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=r"keys\.toml"):
        async with frontend(models, api_keys_path=path):
            pass
