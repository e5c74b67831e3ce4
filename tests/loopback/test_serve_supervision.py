"""What becomes of `stator serve` when its processes are killed and when it is asked to end."""

import asyncio
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import openai
import pytest

from stator.testing.serve_process import StatorProcess, running, wait_gone

pytestmark = pytest.mark.timeout(120)

TEXT = "The stator stands still. 🚀"


class Load:
    """Streams, 12 at a time, until told to end. `outcomes` counts whole answers, errors before the first token and later ones."""

    def __init__(self, url: str) -> None:
        self.outcomes: Counter[str] = Counter()
        self.reasons: list[str] = []
        self._url = url
        self._ending = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))

    async def _run(self) -> None:
        client = openai.AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=30)
        async with client, asyncio.TaskGroup() as group:
            for _ in range(12):
                group.create_task(self._send_again_and_again(client))

    async def _send_again_and_again(self, client: openai.AsyncOpenAI) -> None:
        while not self._ending.is_set():
            text = ""
            try:
                stream = await client.completions.create(model="echo", prompt=TEXT, stream=True)
                async for chunk in stream:
                    text += chunk.choices[0].text
                assert text == TEXT
                self.outcomes["whole"] += 1
            except openai.APIError as error:
                self.outcomes["cut" if text else "refused"] += 1
                self.reasons.append(f"{text!r} {error!r}")

    def wait_for(self, count: int) -> None:
        """Wait until that many more answers are whole."""
        wanted, deadline = self.outcomes["whole"] + count, time.monotonic() + 30
        while self.outcomes["whole"] < wanted:
            assert time.monotonic() < deadline, self.outcomes
            time.sleep(0.02)

    def __enter__(self) -> "Load":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join(30)


def instances_used(service: StatorProcess, since: int) -> set[str]:
    return {found.group(1) for line in service.lines[since:] if (found := re.search(r"at instance (\w+)", line))}


@pytest.fixture(scope="module")
def service() -> Iterator[StatorProcess]:
    arguments = ("serve", "--isolated", "--workers", "2", "--frontends", "2", "--port", "0", "--option", "delay=0.002")
    with StatorProcess(*arguments, environment={"STATOR_LOG": "info,stator.worker.worker=debug"}) as process:
        process.wait_until_ready(workers=2)
        yield process


def test_a_killed_worker_costs_no_request_that_had_not_begun(service: StatorProcess) -> None:
    url = service.wait_until_ready()
    with Load(url) as load:
        load.wait_for(60)
        delays: list[float] = []
        for _ in range(2):
            printed = len(service.lines)
            os.kill(service.children("worker")[-1], signal.SIGKILL)
            died = service.wait_for(r"(worker \d): died \(signal 9, Killed\); starting again in ([\d.]+) s", since=printed)
            delays.append(float(died.group(2)))
            load.wait_for(30)  # the other one goes on
            service.wait_for(rf"{died.group(1)}: ready, serves echo", since=printed)
        printed = len(service.lines)
        load.wait_for(100)
    assert load.outcomes["refused"] == 0, load.reasons
    assert load.outcomes["cut"] <= 24, "only what a killed worker was answering"
    assert delays[0] <= 0.5 <= delays[1], "backoff: half of and all of 0.5 s, then of 1 s"
    assert len(instances_used(service, printed)) == 2, "the new worker gets requests"


def test_a_killed_frontend_is_replaced_while_the_other_one_answers(service: StatorProcess) -> None:
    url = service.wait_until_ready()
    printed = len(service.lines)
    killed = service.children("frontend")[0]
    os.kill(killed, signal.SIGKILL)
    # A killed process keeps its sockets until its last thread has ended: until it was waited for.
    service.wait_for(r"(frontend \d): died \(signal 9, Killed\); starting again", since=printed)

    async def ask() -> list[int]:
        found: list[int] = []
        for _ in range(40):
            body = {"model": "echo", "prompt": "hi"}
            async with aiohttp.ClientSession(url) as session, session.post("/v1/completions", json=body) as answer:
                found.append(answer.status)  # each on a connection of its own
        return found

    assert asyncio.run(ask()) == [200] * 40
    deadline = time.monotonic() + 20
    while len(service.children("frontend")) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert asyncio.run(ask()) == [200] * 40


@contextmanager
def serving(root: Path, *arguments: str, **environment: str) -> Iterator[StatorProcess]:
    environment = {"STATOR_FILE_ROOT": str(root), "STATOR_HTTP_GRACEFUL_SHUTDOWN": "0.3", **environment}
    with StatorProcess("serve", "--port", "0", *arguments, environment=environment) as process:
        yield process


def records(root: Path) -> list[str]:
    return [path.name for path in root.rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_a_signal_ends_everything_within_seconds(tmp_path: Path, number: signal.Signals) -> None:
    with serving(tmp_path, "--workers", "2", "--option", "delay=0.05") as process:
        url = process.wait_until_ready(workers=2)
        assert len(records(tmp_path)) >= 4
        children = process.children()
        assert len(children) == 3
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
            stream = client.completions.create(model="echo", prompt=TEXT * 100, stream=True)
            assert next(iter(stream)).choices[0].text == "T"
            began = time.monotonic()
            process.send(number)
            with pytest.raises(openai.APIError):  # what still runs is told, not just cut
                for _ in stream:
                    pass
        assert process.wait(10) == 0
        assert time.monotonic() - began < 5
        assert running(children) == []
        assert records(tmp_path) == []
        assert process.lines[-1] == "stopped"
        assert not [line for line in process.lines if "Traceback" in line or "ERROR" in line]


def test_a_signal_during_the_start_ends_everything(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "2") as process:
        process.wait_for("starting 2 × echo")
        time.sleep(0.2)
        children = process.children()
        process.send(signal.SIGINT)
        assert process.wait(10) == 0
        assert running(children) == []
        assert records(tmp_path) == []


def test_the_second_signal_ends_at_once(tmp_path: Path) -> None:
    with serving(tmp_path, "--option", "delay=0.05", STATOR_HTTP_GRACEFUL_SHUTDOWN="60") as process:
        url = process.wait_until_ready()
        children = process.children()
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client:
            stream = client.completions.create(model="echo", prompt=TEXT * 100, stream=True)
            next(iter(stream))
            process.send(signal.SIGINT)
            process.wait_for("stopping")
            time.sleep(0.5)
            process.send(signal.SIGINT)
            assert process.wait(5) == 130
            assert running(children) == []
            stream.close()


def test_children_end_when_their_supervisor_is_killed(tmp_path: Path) -> None:
    with serving(tmp_path, "--workers", "2") as process:
        process.wait_until_ready(workers=2)
        children = process.children()
        assert len(children) == 3
        process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert wait_gone(children) == []
        assert records(tmp_path) == []


def test_isolated_leaves_no_directory_behind() -> None:
    with StatorProcess("serve", "--isolated", "--port", "0") as process:
        process.wait_until_ready()
        root = Path(process.wait_for(r"STATOR_FILE_ROOT=(\S+) stator ls").group(1))
        assert len(records(root)) >= 2
        process.send(signal.SIGTERM)
        assert process.wait(10) == 0
    assert not root.exists()
