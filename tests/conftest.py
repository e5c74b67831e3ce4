"""What all tests share: both event loops where bytes move, and no blocking call inside a loop."""

import asyncio
from collections.abc import Callable, Iterator, Mapping

import pytest
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx

LoopFactory = Callable[[], asyncio.AbstractEventLoop]

_BOTH: Mapping[str, LoopFactory] = {"asyncio": asyncio.SelectorEventLoop, "uvloop": uvloop.new_event_loop}
_FAST: Mapping[str, LoopFactory] = {"uvloop": uvloop.new_event_loop}


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Mapping[str, LoopFactory]:
    """Loopback tests run on plain asyncio and on uvloop; the others on uvloop."""
    return _BOTH if "loopback" in item.path.parts and item.get_closest_marker("load") is None else _FAST


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call on an event loop's thread, made from Stator's code, fails the test."""
    with blockbuster_ctx("stator", excluded_modules=["stator.testing"]) as blockbuster:
        yield blockbuster
