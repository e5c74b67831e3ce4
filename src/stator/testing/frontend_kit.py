"""A frontend on a free port, and an HTTP client that shows the bytes as they came."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any, Self

import msgspec
from prometheus_client.parser import text_string_to_metric_families

from stator.frontend import FrontendConfig, FrontendMetrics, FrontendServer, LoadControl, create_app
from stator.frontend.state import STATE, FrontendState
from stator.llm.served import ModelSource
from stator.tasks import SystemClock
from stator.telemetry import MetricSet

__all__ = ["Answer", "RawClient", "RunningFrontend", "chat_body", "events_of", "frontend", "page_sample"]


def page_sample(page: str, name: str, **labels: str) -> float:
    """One value of a metrics page; 0.0 if there is none."""
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return 0.0


class RunningFrontend:
    """A started frontend with its own metrics."""

    def __init__(self, server: FrontendServer, state: FrontendState) -> None:
        self.server = server
        self.state = state
        self.port = server.port
        self.url = server.url

    def metrics(self) -> str:
        """The page of `/metrics`."""
        return self.state.metrics.page.exposition().decode()

    def sample(self, name: str, **labels: str) -> float:
        """One value of it; 0.0 if there is none."""
        return page_sample(self.metrics(), name, **labels)

    async def until_logged(self) -> None:
        """Return when the lines of all answers that were sent are written."""
        await asyncio.sleep(0)  # an answer may be read before the turn of its server ends, in which its line is left
        self.state.log.flush()

    async def until_idle(self, seconds: float = 5.0) -> None:
        """Return when no request is being answered any more; `TimeoutError` otherwise."""
        async with asyncio.timeout(seconds):
            await self.state.idle.wait()


@asynccontextmanager
async def frontend(source: ModelSource, *, load: LoadControl | None = None, **settings: Any) -> AsyncGenerator[RunningFrontend]:
    """Serve `source` on a free port of loopback; `load` is behind `/busy_threshold`, `settings` are fields of `FrontendConfig`."""
    settings.setdefault("graceful_shutdown", 0.2)
    config = FrontendConfig(port=0, **settings)
    clock = SystemClock()
    app = create_app(source, config=config, metrics=FrontendMetrics(MetricSet(), clock), clock=clock, load=load)
    async with FrontendServer(app, config=config) as server:
        yield RunningFrontend(server, app[STATE])


class Answer(msgspec.Struct, frozen=True):
    """A complete HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return msgspec.json.decode(self.body)


class RawClient:
    """One connection. Each step has a deadline of `patience` seconds."""

    def __init__(self, port: int, *, patience: float = 10.0) -> None:
        self._port = port
        self._patience = patience
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Self:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self._port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except OSError:
            pass

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self.writer.write(data)
        await asyncio.wait_for(self.writer.drain(), self._patience)

    async def request(self, method: str, path: str, body: bytes = b"", **headers: str) -> None:
        """Send a whole request; `content_type="…"` and the like are headers."""
        fields = {"host": "test", "content-length": str(len(body))}
        if body:
            fields["content-type"] = "application/json"
        fields |= {name.replace("_", "-"): value for name, value in headers.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        await self.send(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + body)

    async def read(self, size: int = 1 << 20) -> bytes:
        """What comes next; b"" at the end."""
        return await asyncio.wait_for(self.reader.read(size), self._patience)

    async def read_until(self, mark: bytes) -> bytes:
        """Everything up to and with `mark`."""
        return await asyncio.wait_for(self.reader.readuntil(mark), self._patience)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers."""
        first, *lines = (await self.read_until(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        return int(first.split()[1]), {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}

    async def answer(self) -> Answer:
        """The whole answer, decoded from chunks if need be."""
        status, headers = await self.head()
        if headers.get("transfer-encoding") != "chunked":
            if "content-length" not in headers:
                return Answer(status, headers, await asyncio.wait_for(self.reader.read(), self._patience))
            size = int(headers["content-length"])
            return Answer(status, headers, await asyncio.wait_for(self.reader.readexactly(size), self._patience))
        return Answer(status, headers, b"".join([chunk async for chunk in self.chunks()]))

    async def chunks(self) -> AsyncGenerator[bytes]:
        """The HTTP chunks of the body, one by one."""
        while size := int(await self.read_until(b"\r\n"), 16):
            yield (await asyncio.wait_for(self.reader.readexactly(size + 2), self._patience))[:-2]
        await self.read_until(b"\r\n")


def events_of(body: bytes) -> list[Any]:
    """The JSON events of a stream, without `[DONE]` and comments."""
    lines = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line.startswith("data: ")]
    return [msgspec.json.decode(line) for line in lines if line != "[DONE]"]


def chat_body(text: str, *, model: str = "echo", **more: Any) -> bytes:
    """The JSON of a chat request with one message."""
    return msgspec.json.encode({"model": model, "messages": [{"role": "user", "content": text}], **more})
