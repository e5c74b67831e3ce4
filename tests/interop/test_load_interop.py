"""Our monitor and the simulated workers of the reference 1.3.1: their load events take them out of routing, and back in."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from interop.peers import discovery_root, needs_reference
from interop.test_card_interop import running
from stator.errors import Overloaded
from stator.llm.directory import ModelDirectory
from stator.llm.request import PreprocessedRequest, StopConditions
from stator.llm.served import ServedModel
from stator.llm.thresholds import LoadConfig
from stator.runtime import Runtime
from stator.tasks import SystemClock
from stator.testing.plane_suite import eventually
from stator.testing.tiny_tokenizers import build_model_directory

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120), needs_reference]

BLOCKS, BLOCK_SIZE, SLOTS = 100, 16, 6
HALF = LoadConfig(active_decode_blocks_threshold=0.5, stale_after=0.2)
"""their reports come when something changes, and must not go stale whatever the setting"""
WAIT = 30.0


@pytest.fixture(scope="module")
def mocker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, "Popen[bytes]"]]:
    """Two workers in one process."""
    discovery_root(tmp_path_factory)
    tmp = tmp_path_factory.mktemp("mocker")
    model = build_model_directory(tmp / "model")
    options = {
        "--model-path": str(model),
        "--num-workers": "2",
        "--num-gpu-blocks-override": str(BLOCKS),
        "--block-size": str(BLOCK_SIZE),
        "--max-num-seqs": str(SLOTS),
        "--speedup-ratio": "4",
        "--event-plane": "zmq",
    }
    with running(tmp, "-m", "dynamo.mocker", *(word for option in options.items() for word in option)) as process:
        yield tmp / "kv", process


@asynccontextmanager
async def followed(root: Path) -> AsyncGenerator[tuple[ModelDirectory, ServedModel]]:
    """A directory that sees both workers."""
    async with (
        Runtime.connect(plane="compatible", discovery="file", file__root=str(root), event_plane="zmq") as runtime,
        ModelDirectory.follow(runtime, clock=SystemClock(), load=HALF) as directory,
    ):
        await eventually(lambda: any(len(each.instances()) == 2 for each in directory.models()), within=WAIT)
        (served,) = directory.models()
        yield directory, served


def request(*, tokens: int, answer: int, first: int = 1) -> PreprocessedRequest:
    """A prompt of so many tokens; `first` makes its blocks different from those of others."""
    prompt = [first, *(2 + place % 400 for place in range(tokens - 1))]
    return PreprocessedRequest(token_ids=prompt, stop_conditions=StopConditions(max_tokens=answer))


def ask(served: ServedModel, request: PreprocessedRequest) -> Any:
    return served.engine.generate(request, request_id="r", metadata={}, headers={})


async def answer(served: ServedModel, request: PreprocessedRequest) -> tuple[int, int]:
    """Who answered, and with how many tokens."""
    async with ask(served, request) as stream:
        tokens = [token async for batch in stream.batches() for item in batch for token in item.token_ids]
        return stream.instance_id, len(tokens)


async def test_their_workers_leave_routing_while_they_are_over_the_limit(mocker: tuple[Path, "Popen[bytes]"]) -> None:
    async with followed(mocker[0]) as (directory, served):
        monitor = directory.monitor
        runtime = served.card.runtime_config
        assert (runtime.total_kv_blocks, runtime.max_num_seqs) == (BLOCKS, SLOTS)
        assert served.engine.room() == 2 * SLOTS
        # Both have connected to our subscription when both were heard of; before that, reports are lost.
        async with asyncio.timeout(WAIT):
            while {row.worker_id for row in monitor.snapshot()} != set(served.instances()):
                await answer(served, request(tokens=40, answer=2, first=len(monitor.snapshot())))
        # They go on with a request that was killed: each of these takes some seconds, and fits.
        async with ask(served, request(tokens=960, answer=600)) as long:
            await eventually(lambda: monitor.statistics().busy == 1, within=WAIT)
            busy = long.instance_id
            assert served.engine.room() == SLOTS
            (row,) = (row for row in monitor.snapshot() if row.busy)
            assert row.worker_id == busy and row.kv_used_blocks is not None and row.kv_used_blocks > BLOCKS // 2
            (free,) = set(served.instances()) - {busy}
            assert {await answer(served, request(tokens=20, answer=3)) for _ in range(6)} == {(free, 3)}
            async with ask(served, request(tokens=1000, answer=560, first=9)) as other:
                assert other.instance_id == free
                await eventually(lambda: monitor.statistics().busy == 2, within=WAIT)
                with pytest.raises(Overloaded, match=r"2 of 2 workers .*kv_used_blocks \d+ is over 50 \(0\.5 of 100 blocks\)"):
                    await answer(served, request(tokens=20, answer=3))
                monitor.set_thresholds(served.name, active_decode_blocks_threshold=1.0)
                assert served.engine.room() == 2 * (SLOTS - 1)
                monitor.set_thresholds(served.name, active_decode_blocks_threshold=0.5)
                assert served.engine.room() == 0
        await eventually(lambda: monitor.statistics().busy == 0, within=WAIT, what="both said that they are free")
        assert {(await answer(served, request(tokens=20, answer=3)))[0] for _ in range(6)} == {busy, free}
        assert monitor.statistics().malformed == 0


async def test_the_last_word_of_their_worker_stands_and_goes_with_it(mocker: tuple[Path, "Popen[bytes]"]) -> None:
    root, process = mocker
    async with followed(root) as (directory, served):
        monitor = directory.monitor
        async with asyncio.timeout(WAIT):
            while len(monitor.snapshot()) < 2:
                await answer(served, request(tokens=40, answer=2, first=20 + len(monitor.snapshot())))
        await asyncio.sleep(3 * HALF.stale_after)
        monitor.forget_stale()
        assert {row.worker_id for row in monitor.snapshot()} == set(served.instances()), "they repeat nothing"
        await asyncio.to_thread(process.terminate)
        await eventually(lambda: not directory.models() and not monitor.snapshot(), within=WAIT)
