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


class TestNativeTcp(PlaneSuite):
    unix = False

    @asynccontextmanager
    async def pair(self) -> AsyncIterator[PlanePair]:
        loop = asyncio.get_running_loop()
        server_wheel, client_wheel = DeadlineWheel(loop), DeadlineWheel(loop)
        config = NativeConfig(unix=self.unix)
        with tempfile.TemporaryDirectory() as directory:
            server = await NativeServer.listen(
                config=config,
                process="a" * 32,
                advertise_host="127.0.0.1",
                socket_directory=Path(directory),
                wheel=server_wheel,
                clock=SystemClock(),
            )
            client = await NativeClient.start(config=config, process="b" * 32, wheel=client_wheel, random=Random(1))

            def cut() -> None:
                for line in client._lines.values():  # pyright: ignore[reportPrivateUsage]
                    assert line.connection is not None
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
