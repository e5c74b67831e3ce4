"""The native plane keeps the meaning of a request, over TCP and over a Unix socket."""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from stator.testing.native_pair import CLIENT_PROCESS
from stator.testing.native_sockets import native_planes
from stator.testing.plane_pair import plane_host
from stator.testing.plane_suite import PlanePair, PlaneSuite
from stator.transports.native import NativeConfig


class TestNativeTcp(PlaneSuite):
    unix = False

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        with tempfile.TemporaryDirectory() as directory:
            here, there = (plane_host(process, directory=Path(directory)) for process in ("a" * 32, CLIENT_PROCESS))
            async with native_planes(NativeConfig(unix=self.unix), here, there) as pair:
                yield pair


class TestNativeUnix(TestNativeTcp):
    unix = True
