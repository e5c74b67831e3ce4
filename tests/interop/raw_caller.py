"""A client of the TCP request plane that sends exactly what it is told, byte by byte if need be (`spec/10 §1-§4`)."""

import asyncio
import itertools
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

_ids = itertools.count(1)

Frame = tuple[bytes, bytes]


def two_part(header: bytes = b"", data: bytes = b"") -> bytes:
    return struct.pack(">QQQ", len(header), len(data), 0) + header + data


class Call:
    """The connection that the worker made to answer one request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def frame(self) -> Frame | None:
        """The next one; None at the end of the connection."""
        try:
            sizes = struct.unpack(">QQQ", await self._reader.readexactly(24))
            return await self._reader.readexactly(sizes[0]), await self._reader.readexactly(sizes[1])
        except (asyncio.IncompleteReadError, ConnectionError):
            return None

    async def take(self, items: int) -> list[Any]:
        """The next items as they stand on the wire, at most so many, until the sentinel or the end."""
        found: list[Any] = []
        while len(found) < items and (frame := await self.frame()) is not None and frame[0] != b'"sentinel"':
            if frame[1]:
                found.append(json.loads(frame[1]))
        return found

    def say(self, word: str) -> None:
        self._writer.write(two_part(json.dumps(word).encode()))

    def give(self, value: Any) -> None:
        """One input."""
        self._writer.write(two_part(data=json.dumps(value).encode()))

    def close(self) -> None:
        """FIN; a reset follows if the worker goes on writing."""
        self._writer.close()

    def reset(self) -> None:
        self._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class RawCaller:
    """One request connection to a worker and one listener for its answers."""

    def __init__(self, path: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._path = path
        self._reader = reader
        self._writer = writer
        self._calls: dict[str, asyncio.Future[tuple[Call, Frame | None]]] = {}
        self._open: list[asyncio.StreamWriter] = []
        self.address = ""

    async def called(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A worker calls."""
        self._open.append(writer)
        call = Call(reader, writer)
        handshake = await call.frame()
        if handshake is None:
            return
        said = json.loads(handshake[0])
        prologue = await call.frame() if said["stream_type"] == "response" else None
        expected = self._calls.get(said["subject"])
        if expected is not None:
            expected.set_result((call, prologue))

    def control(self, **changes: Any) -> dict[str, Any]:
        """A control message. `info` in `changes` are changes to where the answer is to go."""
        number = next(_ids)
        info = {"address": self.address, "subject": f"s{number:06}", "context": f"r{number:06}", "stream_type": "response"}
        info |= changes.pop("info", {})
        message = {"id": f"r{number:06}", "request_type": "single_in", "response_type": "many_out", "payload_codec": "json"}
        return {**message, "connection_info": {"transport": "tcp_server", "info": json.dumps(info)}, **changes}

    async def send(self, payload: bytes, *, headers: dict[str, str] | None = None, path: bytes | None = None) -> bytes:
        """Send a request frame; the acknowledgement."""
        path = self._path.encode() if path is None else path
        header = json.dumps({} if headers is None else headers).encode()
        self._writer.write(struct.pack(">H", len(path)) + path + struct.pack(">H", len(header)) + header)
        self._writer.write(struct.pack(">I", len(payload)) + payload)
        size = struct.unpack(">I", await self._reader.readexactly(4))[0]
        return await self._reader.readexactly(size)

    async def ask(self, request: Any, *, stamp: bool = True) -> tuple[bytes, str]:
        """Send a request in good order; acknowledgement and subject."""
        control = self.control()
        subject = json.loads(control["connection_info"]["info"])["subject"]
        self._calls[subject] = asyncio.get_running_loop().create_future()
        headers = {"x-frontend-send-ts-ns": "1"} if stamp else {}
        payload = two_part(json.dumps(control).encode(), json.dumps(request).encode())
        return await self.send(payload, headers=headers), subject

    async def converse(self) -> tuple[Call, Call]:
        """A bidirectional request in good order: the connections for inputs and for the answer."""
        control = self.control(request_type="many_in")
        answer = json.loads(control["connection_info"]["info"])
        inputs = {**answer, "subject": f"{answer['subject']}-inputs", "stream_type": "request"}
        control["request_stream_connection_info"] = {"transport": "tcp_server", "info": json.dumps(inputs)}
        for each in (answer, inputs):
            self._calls[each["subject"]] = asyncio.get_running_loop().create_future()
        headers = {"x-frontend-send-ts-ns": "1"}
        assert await self.send(two_part(json.dumps(control).encode()), headers=headers) == b""
        taking, _ = await asyncio.wait_for(self._calls[inputs["subject"]], 10)
        giving, prologue = await self.answer(answer["subject"])
        assert prologue == {"error": None}, prologue
        return taking, giving

    async def answer(self, subject: str) -> tuple[Call, dict[str, Any]]:
        """The worker's call for `subject`, and its prologue; nothing in it if the worker ended the connection before."""
        call, prologue = await asyncio.wait_for(self._calls[subject], 10)
        return call, {} if prologue is None else json.loads(prologue[0])

    async def open(self, request: Any) -> Call:
        """A request that is accepted."""
        acknowledgement, subject = await self.ask(request)
        assert acknowledgement == b"", acknowledgement
        call, prologue = await self.answer(subject)
        assert prologue == {"error": None}, prologue
        return call

    async def aclose(self) -> None:
        for writer in (self._writer, *self._open):
            writer.close()
            try:
                await asyncio.wait_for(writer.wait_closed(), 5)
            except (ConnectionError, TimeoutError):
                continue


@asynccontextmanager
async def raw_caller(address: str) -> AsyncIterator[RawCaller]:
    """A caller of `address`, which is `host:port/path` as records have it."""
    place, _, path = address.partition("/")
    host, _, port = place.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    caller = RawCaller(path, reader, writer)
    server = await asyncio.start_server(caller.called, "127.0.0.1", 0)
    caller.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield caller
    finally:
        server.close()
        await caller.aclose()
