"""Which request the canary sends: who is asked first, and what becomes of a payload that is none."""

from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from stator.llm.output import EngineOutput
from stator.llm.request import PreprocessedRequest, read_request
from stator.runtime.context import Context
from stator.worker import EngineConfig, LLMEngine
from stator.worker.health_payload import health_payload

pytestmark = pytest.mark.timeout(10)

OF_SPEC = {
    "token_ids": [1],
    "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
    "sampling_options": {"temperature": 0.0},
    "_HEALTH_CHECK": True,
}


class Engine(LLMEngine):
    """Says what it was given."""

    def __init__(self, payload: Mapping[str, Any] | Exception | None = None) -> None:
        self.payload = payload

    async def start(self, instance_id: int) -> EngineConfig:
        raise NotImplementedError

    async def generate(self, request: PreprocessedRequest, context: Context) -> AsyncIterator[EngineOutput]:
        yield EngineOutput(token_ids=[])

    def health_payload(self) -> Mapping[str, Any] | None:
        if isinstance(self.payload, Exception):
            raise self.payload
        return self.payload


async def test_without_a_word_it_asks_for_one_token() -> None:
    payload = await health_payload(Engine(), "")
    assert payload == OF_SPEC
    request = read_request(payload)
    assert request.health_check is True
    assert request.stop_conditions.max_tokens == 1


async def test_the_engines_own_is_marked_as_a_probe() -> None:
    own = {"token_ids": [5, 6]}
    assert await health_payload(Engine(own), "") == {"token_ids": [5, 6], "_HEALTH_CHECK": True}
    assert own == {"token_ids": [5, 6]}, "what the engine keeps is not written to"


async def test_an_engine_may_want_no_canary() -> None:
    assert await health_payload(Engine({}), "") is None


async def test_an_engine_that_cannot_say_has_no_canary(caplog: pytest.LogCaptureFixture) -> None:
    assert await health_payload(Engine(RuntimeError("not now")), "") is None
    assert "engine.health_payload() failed; canary disabled for this endpoint" in caplog.text


async def test_the_operators_comes_first(tmp_path: Path) -> None:
    engine = Engine({"token_ids": [5]})
    assert await health_payload(engine, '{"token_ids":[9]}') == {"token_ids": [9], "_HEALTH_CHECK": True}
    path = tmp_path / "payload.json"
    path.write_text('{"token_ids":[8],"_HEALTH_CHECK":false}', "utf-8")
    assert await health_payload(engine, f"@{path}") == {"token_ids": [8], "_HEALTH_CHECK": True}


async def test_an_empty_one_of_the_operator_is_one_nevertheless() -> None:
    """No request goes without tokens."""
    assert await health_payload(Engine({}), "{}") == {"token_ids": [1], "_HEALTH_CHECK": True}


@pytest.mark.parametrize("text", ["nope", "[1]", "3", "@/no/such/file", "@", "[" * 100_000])
async def test_what_is_no_object_is_told_and_ignored(text: str, caplog: pytest.LogCaptureFixture) -> None:
    assert await health_payload(Engine({"token_ids": [5]}), text) == {"token_ids": [5], "_HEALTH_CHECK": True}
    assert "the canary payload in the settings is ignored" in caplog.text
