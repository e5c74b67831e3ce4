"""Programs under `@dynamo_worker()` in processes of their own: how they end, and with which status."""

import signal
import sys
import time
from pathlib import Path

import pytest

from stator.dynamo.decorators import _SAME_SIGNAL  # pyright: ignore[reportPrivateUsage]  # its length
from stator.testing.serve_process import StatorProcess

pytestmark = pytest.mark.timeout(60)

PROGRAM = """
import asyncio, json, os, signal, sys
from stator.dynamo.runtime import dynamo_worker

async def slow(request):
    for number in range(request):
        yield number
        await asyncio.sleep(0.02)

@dynamo_worker()
async def main(runtime, what):
    endpoint = runtime.endpoint("test.signals.generate")
    if what == "handles itself":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: (print("mine", flush=True), runtime.shutdown()))
    serving = asyncio.ensure_future(endpoint.serve_endpoint(slow))
    client = await endpoint.client()
    await client.wait_for_instances()
    if what == "raises":
        stream = await client.random(1000, annotated=False)
        await anext(stream)
        raise RuntimeError("of the program")
    print("ready", flush=True)
    if what.startswith("stream"):
        stream = await client.random(int(what.split()[1]), annotated=False)
        items = [await anext(stream)]
        print("streaming", flush=True)
        items += [item async for item in stream]
        print("items", len(items), flush=True)
    if what == "never returns":
        await asyncio.Event().wait()
    await serving
    print("returned", flush=True)

asyncio.run(main(sys.argv[1]))
print("result", flush=True)
"""


def program(root: Path, what: str) -> StatorProcess:
    environment = {"STATOR_FILE_ROOT": str(root / "cluster"), "PYTHONUNBUFFERED": "1"}
    (root / "program.py").write_text(PROGRAM, encoding="utf-8")
    return StatorProcess(command=(sys.executable, "program.py", what), directory=root, environment=environment)


def records(root: Path) -> list[Path]:
    return list(root.rglob("instances/*"))


def test_sigterm_drains_and_the_status_is_zero(tmp_path: Path) -> None:
    with program(tmp_path, "stream 50") as process:
        process.wait_for("streaming")
        assert len(records(tmp_path)) == 1
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.output
        assert process.lines[-3:] == ["items 50", "returned", "result"]
    assert records(tmp_path) == []


def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    with program(tmp_path, "stream 100000") as process:
        process.wait_for("streaming")
        process.send(signal.SIGTERM)
        time.sleep(_SAME_SIGNAL + 0.2)
        assert process.process.poll() is None
        process.send(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM
        assert "returned" not in process.lines
    assert records(tmp_path) == []


def test_a_program_that_does_not_return_ends_by_the_signal(tmp_path: Path) -> None:
    with program(tmp_path, "never returns") as process:
        process.wait_for("ready")
        process.send(signal.SIGTERM)
        assert process.wait(8) == -signal.SIGTERM
    assert records(tmp_path) == []


def test_a_program_that_handles_sigterm_itself_is_left_alone(tmp_path: Path) -> None:
    with program(tmp_path, "handles itself") as process:
        process.wait_for("ready")
        process.send(signal.SIGTERM)
        assert process.wait() == 0, process.output
        assert process.lines[-3:] == ["mine", "returned", "result"]


def test_sigint_is_asyncios(tmp_path: Path) -> None:
    with program(tmp_path, "stream 100000") as process:
        process.wait_for("streaming")
        process.send(signal.SIGINT)
        assert process.wait(5) == -signal.SIGINT
        assert "KeyboardInterrupt" in process.output
    assert records(tmp_path) == []


def test_an_exception_of_the_program_ends_it_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    with program(tmp_path, "raises") as process:
        assert process.wait(10) == 1
        assert "RuntimeError: of the program" in process.output
    assert records(tmp_path) == []
