"""An installed distribution that brings an engine, a routing policy and a discovery backend, used from the command line."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from stator.testing.serve_process import StatorProcess, run_stator, running

pytestmark = pytest.mark.timeout(60)

MODULE = """
import asyncio
import time
from typing import Annotated, ClassVar

from stator.config import Config, Setting
from stator.discovery import FileDiscoveryConfig, open_file
from stator.llm.card import byte_card
from stator.llm.output import EngineOutput
from stator.worker import EngineConfig, LLMEngine


class ShoutOptions(Config, frozen=True, kw_only=True):
    section: ClassVar[str] = "shout"

    suffix: Annotated[str, Setting(doc="what is said at the end")] = "!"
    slow: Annotated[float, Setting(doc="how long the start takes", unit="s")] = 0.0


class ShoutEngine(LLMEngine):
    options_type = ShoutOptions

    def __init__(self, options):
        self.options = options

    def follow_progress(self, report):
        report("warming up")

    async def start(self, instance_id):
        print("plain prints are shown as well")
        await asyncio.to_thread(time.sleep, self.options.slow)
        return EngineConfig(model="shout", card=await asyncio.to_thread(byte_card, "shout"))

    async def generate(self, request, context):
        text = bytes(request.token_ids).decode().upper() + self.options.suffix
        yield EngineOutput(token_ids=list(text.encode()), finish_reason="stop")


class First:
    name = "first"
    needs_load = False

    def choose(self, free, request, random):
        return min(free, key=lambda candidate: candidate.instance_id)


class ShelfConfig(Config, frozen=True, kw_only=True):
    section: ClassVar[str] = "shelf"

    place: Annotated[str, Setting(doc="directory")]


def open_shelf(config: ShelfConfig, *, clock, random):
    return open_file(FileDiscoveryConfig(root=config.place), clock=clock, random=random)
"""

ENTRY_POINTS = """
[stator.engines]
shout = acme_shout:ShoutEngine
broken = acme_nowhere:Engine

[stator.routing]
first = acme_shout:First

[stator.discovery]
shelf = acme_shout:open_shelf
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What makes the distribution installed and its discovery the one in use."""
    site = tmp_path_factory.mktemp("site")
    (site / "acme_shout.py").write_text(MODULE, encoding="utf-8")
    (site / "acme_shout-1.0.dist-info").mkdir()
    (site / "acme_shout-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-shout\nVersion: 1.0\n")
    (site / "acme_shout-1.0.dist-info" / "entry_points.txt").write_text(ENTRY_POINTS)
    shelf = tmp_path_factory.mktemp("shelf")
    return {"PYTHONPATH": str(site), "STATOR_DISCOVERY": "shelf", "STATOR_SHELF_PLACE": str(shelf)}


@pytest.fixture(scope="module")
def service(environment: dict[str, str]) -> Iterator[StatorProcess]:
    settings = {**environment, "STATOR_SHOUT_SUFFIX": "?!", "STATOR_LOG": "info,stator.worker.worker=debug"}
    arguments = ("--engine", "shout", "--workers", "2", "--policy", "first")
    with StatorProcess("serve", "--port", "0", *arguments, environment=settings) as process:
        process.wait_until_ready(workers=2)
        yield process


def test_engine_policy_and_settings_are_the_plug_ins(service: StatorProcess) -> None:
    printed = len(service.lines)
    with openai.OpenAI(base_url=f"{service.wait_until_ready()}/v1", api_key="none", timeout=10) as client:
        answers = [client.completions.create(model="shout", prompt=f"grüße {number}").choices[0].text for number in range(6)]
    assert answers == [f"GRÜSSE {number}?!" for number in range(6)]
    service.wait_for(r"at instance \w+", since=printed)
    used = {found.group(1) for line in service.lines[printed:] if (found := re.search(r"at instance (\w+)", line))}
    assert len(used) == 1, "the policy always takes the first"


def test_what_the_plug_in_says_is_shown(service: StatorProcess) -> None:
    service.wait_for(r"^  worker 1: warming up$")
    service.wait_for(r"^  worker 1: plain prints are shown as well$")


def test_ls_asks_the_plug_ins_discovery(service: StatorProcess, environment: dict[str, str]) -> None:
    service.wait_until_ready(workers=2)
    found = run_stator("ls", environment=environment)
    assert found.returncode == 0
    assert found.stdout.splitlines()[-1] == f"2 instances (file {environment['STATOR_SHELF_PLACE']})"


def test_unknown_settings_are_found_among_the_plug_ins_too(environment: dict[str, str]) -> None:
    found = run_stator("ls", environment={**environment, "STATOR_SHOUT_SUFIX": "x"})
    assert found.returncode == 2
    assert found.stderr == "error: no setting is called 'STATOR_SHOUT_SUFIX'; did you mean 'STATOR_SHOUT_SUFFIX'?\n"


def test_a_plug_in_that_is_broken_is_one_line(environment: dict[str, str]) -> None:
    found = run_stator("worker", "--engine", "broken", environment=environment)
    assert found.returncode == 2
    assert found.stderr == ("error: the plug-in 'broken' of stator.engines cannot be loaded: No module named 'acme_nowhere'\n")


def test_a_signal_while_an_engine_starts_ends_everything(environment: dict[str, str], tmp_path: Path) -> None:
    settings = {**environment, "STATOR_SHELF_PLACE": str(tmp_path)}
    with StatorProcess("serve", "--port", "0", "--engine", "shout", "--option", "slow=50", environment=settings) as process:
        process.wait_for("worker 1: plain prints")
        children = process.children()
        began = time.monotonic()
        process.send(signal.SIGTERM)
        assert process.wait(15) == 0
        assert time.monotonic() - began < 6
        assert running(children) == []
