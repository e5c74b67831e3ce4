"""The native plane keeps the meaning of a request, over TCP and over a Unix socket."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

from stator.errors import ConnectFailed
from stator.tasks import DeadlineWheel, SystemClock
from stator.testing.plane_suite import PlanePair, PlaneSuite
from stator.transports.native import NativeClient, NativeConfig, NativeServer
from stator.transports.plane import PlaneHost


class TestNativeTcp(PlaneSuite):
    unix = False

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        loop = asyncio.get_running_loop()
        with tempfile.TemporaryDirectory() as directory:

            def host(process: str) -> PlaneHost:
                return PlaneHost(
                    process=process * 32,
                    bind_host="127.0.0.1",
                    advertise_host="127.0.0.1",
                    socket_directory=Path(directory),
                    wheel=DeadlineWheel(loop),
                    clock=SystemClock(),
                    random=Random(1),
                    observer=None,
                )

            config = NativeConfig(unix=self.unix)
            server = await NativeServer.listen(config, host("a"))
            client = await NativeClient.start(config, host("b"))

            def cut() -> None:
                for line in tuple(client._all):  # pyright: ignore[reportPrivateUsage]
                    line.connection.abort(ConnectFailed("cut by the test"))

            try:
                yield PlanePair(
                    server=server, client=client, cut=cut, open_streams=lambda: server.open_streams + client.open_streams
                )
            finally:
                await client.aclose()
                await server.aclose()


class TestNativeUnix(TestNativeTcp):
    unix = True
