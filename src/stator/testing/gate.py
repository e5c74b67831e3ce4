"""A way to a server on this machine that can be shut: who goes through it is cut off while everybody else is not.

async with Gate(etcd.client_port) as gate:
    ... connect to 127.0.0.1:gate.port ...
    gate.shut()      # what is open breaks, new connections are closed at once
    gate.open()
"""

import asyncio
from types import TracebackType
from typing import Self

from stator.tasks import Scope

__all__ = ["Gate"]


class Gate:
    """Passes bytes in both directions."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._scope = Scope("gate")
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_open = True
        self.port = 0

    async def __aenter__(self) -> Self:
        await self._scope.__aenter__()
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shut()
        if self._server is not None:
            self._server.close()
        await self._scope.__aexit__(None, None, None)

    def shut(self) -> None:
        """Nothing passes from now on."""
        self._is_open = False
        for writer in tuple(self._writers):
            writer.close()

    def open(self) -> None:
        """New connections pass again."""
        self._is_open = True

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_open:
            self._scope.spawn(self._pass(reader, writer), name="connection")
        else:
            writer.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            self._writers.add(back)
            try:
                await asyncio.gather(_copy(reader, back), _copy(there, writer))
            finally:
                self._writers.discard(back)
                back.close()
        except OSError:  # one side is gone, and so is the other
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(1 << 16):
        writer.write(chunk)
        await writer.drain()
    writer.close()
