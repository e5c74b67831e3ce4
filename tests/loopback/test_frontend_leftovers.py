"""What a request has left behind when it is over, well or badly: nothing that only the cyclic garbage collector would find."""

import logging
from collections.abc import AsyncGenerator, Iterator

import pytest

from stator.errors import EngineError, Overloaded, Unavailable
from stator.llm.output import EngineOutput
from stator.testing.fake_models import EngineCall, FakeEngine, FakeModels, Script, echo_script
from stator.testing.frontend_kit import RawClient, chat_body, frontend
from stator.testing.plane_suite import uncollected

pytestmark = pytest.mark.timeout(30)


async def fails(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
    raise Unavailable("nobody is there")
    yield []


async def is_busy(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
    raise Overloaded("no slot is free")
    yield []


async def breaks_off(call: EngineCall) -> AsyncGenerator[list[EngineOutput]]:
    yield [EngineOutput(token_ids=[65])]
    raise EngineError("it broke")


@pytest.fixture
def no_log() -> Iterator[None]:
    """Records that are captured keep the errors they tell of."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.usefixtures("no_log")
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("script", "status"),
    [(echo_script, 200), (fails, 503), (is_busy, 503), (breaks_off, 500)],
)
async def test_the_collector_finds_nothing(script: Script, status: int, stream: bool, n: int) -> None:
    models = FakeModels()
    models.add("echo", FakeEngine(script))
    begun = status == 200 or (stream and script is breaks_off)
    async with frontend(models, queue_wait=0.05) as running, RawClient(running.port) as raw:

        async def three() -> None:
            for _ in range(3):
                await raw.request("POST", "/v1/chat/completions", chat_body("x", n=n, stream=stream))
                assert (await raw.answer()).status == (200 if begun else status)

        await three()
        with uncollected() as found:
            await three()
        assert not found, found
