"""`stator.run` in processes of their own: the first signal drains, the second one ends at once."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from stator import Runtime
from stator.errors import StatorError
from stator.runtime.signals import _SAME_SIGNAL, run, shutdown_event  # pyright: ignore[reportPrivateUsage]  # its length

pytestmark = pytest.mark.timeout(60)

PATH = "test.signals.generate"

WORKER = """
import asyncio, sys
from stator import Runtime, run

async def generate(request, context):
    for number in range(request):
        yield number
        await asyncio.sleep(0.02)

async def main():
    async with Runtime.connect(discovery="file", file__root=sys.argv[1], plane=sys.argv[2]) as runtime:
        async with asyncio.TaskGroup() as group:
            group.create_task(runtime.endpoint("test.signals.generate").serve(generate))
            group.create_task(runtime.endpoint("test.signals.other").serve(generate))
            while len(runtime.discovery.owned()) < 2:
                await asyncio.sleep(0.01)
            print("ready", flush=True)
    print("left", flush=True)

try:
    print("result", run(main()), flush=True)
except asyncio.CancelledError:
    print("cancelled", flush=True)
    raise SystemExit(3)
"""


@asynccontextmanager
async def worker(root: Path, plane: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", WORKER, str(root), plane, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    assert process.stdout is not None
    try:
        async with asyncio.timeout(30):
            assert await process.stdout.readline() == b"ready\n"
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def said(process: asyncio.subprocess.Process) -> str:
    """The rest of its output, once it has ended."""
    assert process.stdout is not None
    async with asyncio.timeout(20):
        text = (await process.stdout.read()).decode()
        await process.wait()
    return text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("plane", ["native", "compatible"])
async def test_the_first_signal_lets_streams_finish(tmp_path: Path, plane: str, number: signal.Signals) -> None:
    async with (
        worker(tmp_path, plane) as process,
        Runtime.connect(discovery="file", file__root=str(tmp_path), plane=plane, instance_timeout=0.1) as runtime,
    ):
        client = await runtime.endpoint(PATH).client()
        await client.wait_for_instances(timeout=20)
        async with client.generate(40) as stream:
            assert await anext(stream) == 0
            process.send_signal(number)
            async with asyncio.timeout(10):
                while client.instance_ids():
                    await asyncio.sleep(0.01)
            with pytest.raises(StatorError):
                await client.generate(1, timeout=3.0).collect()
            assert await stream.collect() == list(range(1, 40))
        assert await said(process) == "left\nresult None\n"
        assert process.returncode == 0


async def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    async with worker(tmp_path, "native") as process, Runtime.connect(discovery="file", file__root=str(tmp_path)) as runtime:
        client = await runtime.endpoint(PATH).client()
        await client.wait_for_instances(timeout=20)
        async with client.generate(1_000_000) as stream:
            assert await anext(stream) == 0
            process.send_signal(signal.SIGTERM)
            async with asyncio.timeout(10):
                while client.instance_ids():
                    await asyncio.sleep(0.01)
            process.send_signal(signal.SIGTERM)  # so soon it is the same one, sent twice: to the group and to the process
            running = asyncio.get_running_loop().time() + 1.5 * _SAME_SIGNAL
            while asyncio.get_running_loop().time() < running:
                await anext(stream)
            second = asyncio.get_running_loop().time()
            process.send_signal(signal.SIGTERM)
            with pytest.raises(StatorError):
                while True:
                    await anext(stream)
        assert await said(process) == "cancelled\n"
        assert process.returncode == 3
        assert asyncio.get_running_loop().time() - second < 5


async def test_without_a_request_the_end_is_quick(tmp_path: Path) -> None:
    async with worker(tmp_path, "native") as process:
        started = asyncio.get_running_loop().time()
        process.send_signal(signal.SIGTERM)
        assert "result None" in await said(process)
        assert asyncio.get_running_loop().time() - started < 10


def test_run_returns_what_main_returns_and_raises_what_it_raises() -> None:
    async def fine() -> int:
        assert shutdown_event() is not None
        return 7

    async def fails() -> None:
        raise ValueError("broken")

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    assert run(fine()) == 7
    with pytest.raises(ValueError, match="broken"):
        run(fails())
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert shutdown_event() is None


def test_one_runtime_after_the_other_in_one_program() -> None:
    """Leaving the first one is no shutdown of the program."""

    async def echo(request: object) -> AsyncIterator[object]:
        yield request

    async def main() -> list[object]:
        async with Runtime.connect(discovery="memory", plane="memory"):
            pass
        async with Runtime.connect(discovery="memory", plane="memory") as runtime:
            waiting = asyncio.ensure_future(runtime.endpoint(PATH).serve(echo))
            client = await runtime.endpoint(PATH).client()
            await client.wait_for_instances(timeout=5)
            answer = await client.generate("second").collect()
            assert not waiting.done()
            runtime.shutdown()
            await asyncio.wait_for(waiting, 5)
            return answer

    assert run(main()) == ["second"]


def test_a_signal_ends_every_runtime_of_the_program() -> None:
    async def main() -> None:
        async with (
            Runtime.connect(discovery="memory", plane="memory") as one,
            Runtime.connect(discovery="memory", plane="memory") as other,
        ):
            asyncio.get_running_loop().call_later(0.05, signal.raise_signal, signal.SIGTERM)
            await asyncio.wait_for(one.wait_for_shutdown(), 5)
            await asyncio.wait_for(other.wait_for_shutdown(), 5)

    run(main())


async def test_connecting_touches_no_signal() -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with Runtime.connect(discovery="memory", plane="memory"):
        assert signal.getsignal(signal.SIGTERM) is before
