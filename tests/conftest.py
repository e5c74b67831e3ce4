"""What all tests share: every loop flavour, and no blocking call inside a loop."""

import asyncio
from collections.abc import Iterator

import pytest
import uvloop
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(params=["asyncio", "uvloop"])
def event_loop_policy(request: pytest.FixtureRequest) -> asyncio.AbstractEventLoopPolicy:
    """Run each asynchronous test on both event loops."""
    return uvloop.EventLoopPolicy() if request.param == "uvloop" else asyncio.DefaultEventLoopPolicy()


@pytest.fixture(autouse=True)
def no_blocking_calls() -> Iterator[BlockBuster]:
    """A blocking call on an event loop's thread, made from Stator's code, fails the test."""
    with blockbuster_ctx("stator") as blockbuster:
        yield blockbuster
