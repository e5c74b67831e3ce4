"""What several files of this folder ask for: a frontend with one model, and IPv6."""

import socket
from collections.abc import AsyncIterator

import pytest

from stator.testing.fake_models import FakeEngine, FakeModels
from stator.testing.frontend_kit import RawClient, RunningFrontend, frontend


@pytest.fixture
def models() -> FakeModels:
    """One model, `echo`."""
    models = FakeModels()
    models.add("echo", FakeEngine())
    return models


@pytest.fixture
async def running(models: FakeModels) -> AsyncIterator[RunningFrontend]:
    """A frontend that serves `models`."""
    async with frontend(models) as running:
        yield running


@pytest.fixture
async def raw(running: RunningFrontend) -> AsyncIterator[RawClient]:
    """A connection to it."""
    async with RawClient(running.port) as raw:
        yield raw


@pytest.fixture
def ipv6() -> None:
    """Skips the test where there is no ::1."""
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no IPv6 loopback: {error}")
