"""Which event plane a runtime has, and that it costs nothing until it is used."""

import logging
import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Annotated, Any, ClassVar

import pytest

from stator.config import Config, Setting
from stator.discovery.memory import MemoryStore
from stator.errors import ConfigError
from stator.events import EventHost, MemoryBus, MemoryEvents
from stator.events.nats import NatsEvents
from stator.events.zmq import ZmqEvents
from stator.runtime import Runtime, RuntimeConfig, plugins
from stator.runtime.event_plane import choose_event_plane
from stator.settings import load

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"discovery": MemoryStore()}, MemoryEvents),
        ({"discovery": "memory"}, MemoryEvents),
        ({"discovery": "file"}, ZmqEvents),
        ({"discovery": "memory", "event_plane": "zmq"}, ZmqEvents),
        ({"discovery": "memory", "event_plane": "nats"}, NatsEvents),
        ({"discovery": "file", "event_plane": "memory"}, MemoryEvents),
        ({"discovery": "file", "event_plane": MemoryBus()}, MemoryEvents),
    ],
)
async def test_the_plane_that_is_meant(settings: dict[str, Any], kind: type, tmp_path: Any) -> None:
    async with Runtime.connect(plane="memory", file__root=str(tmp_path), **settings) as runtime:
        assert type(runtime.events) is kind


@pytest.mark.parametrize(
    ("env", "plane"),
    [
        ({}, "auto"),
        ({"DYN_EVENT_PLANE": "nats"}, "nats"),
        ({"DYN_EVENT_PLANE": "zmq"}, "zmq"),
        ({"DYN_EVENT_PLANE": ""}, "auto"),
        ({"DYN_EVENT_PLANE": "nats", "STATOR_EVENT_PLANE": "memory"}, "memory"),
    ],
)
def test_the_references_variable(env: dict[str, str], plane: str) -> None:
    assert load(RuntimeConfig, env=env).event_plane == plane


def test_a_plane_the_reference_does_not_know_is_ignored_as_it_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(RuntimeConfig, env={"DYN_EVENT_PLANE": "pigeons"}).event_plane == "auto"
    assert "DYN_EVENT_PLANE='pigeons' is ignored: expected nats or zmq" in caplog.text


async def test_an_unknown_plane_is_said_when_joining() -> None:
    with pytest.raises(ConfigError, match=r"stator\.events has no plug-in called 'pigeons'; there are: memory, nats, zmq"):
        async with Runtime.connect(discovery="memory", plane="memory", event_plane="pigeons"):
            pass


async def test_a_bad_setting_of_the_plane_is_said_when_joining() -> None:
    with pytest.raises(ConfigError, match=r"nats.*servers"):
        async with Runtime.connect(discovery="memory", plane="memory", event_plane="nats", nats__servers="http://a:1"):
            pass


class PigeonConfig(Config, frozen=True, kw_only=True):
    section: ClassVar[str] = "pigeons"
    flock: Annotated[int, Setting(doc="how many", ge=1)] = 1


class Pigeons:
    def __init__(self, config: PigeonConfig, *, host: EventHost) -> None:
        self.config, self.host = config, host


def test_a_plane_of_somebody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("pigeons", f"{__name__}:Pigeons", "stator.events")
    monkeypatch.setattr(plugins, "_registered", lambda group: {"pigeons": entry})
    monkeypatch.setattr(EntryPoint, "load", lambda self: Pigeons)
    make: Any = choose_event_plane("pigeons", in_memory=False, sections={"pigeons.flock": "3"})
    plane = make("host")
    assert (plane.config, plane.host) == (PigeonConfig(flock=3), "host")


def test_a_plane_that_does_not_say_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("pigeons", f"{__name__}:Pigeons", "stator.events")
    monkeypatch.setattr(plugins, "_registered", lambda group: {"pigeons": entry})
    monkeypatch.setattr(EntryPoint, "load", lambda self: lambda host: None)
    with pytest.raises(ConfigError, match="does not say which settings"):
        choose_event_plane("pigeons", in_memory=False, sections={})


@pytest.mark.parametrize("plane", ["zmq", "nats"])
def test_libraries_are_loaded_at_first_use(plane: str) -> None:
    code = f"""
import asyncio, sys, stator, stator.events
from stator.runtime import Runtime
async def main():
    async with Runtime.connect(discovery="memory", plane="memory", event_plane="{plane}"):
        pass
asyncio.run(main())
print(sorted({{"zmq", "nats"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "[]\n"
