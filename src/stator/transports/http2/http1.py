"""HTTP/1.1 on a worker's listener: requests of 1.2.1 peers, whose answers call home (`spec/10 §7`).

The web server of `aiohttp` reads and writes it; a stream in the response body needs HTTP/2 (`docs/http2-plane.md §7`).
"""

import asyncio

from aiohttp import web
from aiohttp.web_protocol import RequestHandler
from aiohttp.web_request import BaseRequest

from stator.errors import Overloaded
from stator.protocol.http2_map import NOT_FOUND, STREAM_TYPE
from stator.protocol.request_frame import OVERLOADED
from stator.transports.http2.desk import Desk
from stator.transports.http2.pushed import push

__all__ = ["Http1Server"]

_MOST_LINE = 8190
_CLOSE_LIMIT = 1.0


class Http1Server:
    """Answers what arrives on connections that speak HTTP/1.1; one for all of them."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._server = web.Server(
            self._answer,
            access_log=None,
            keepalive_timeout=desk.config.idle_timeout,
            max_line_size=_MOST_LINE,
            max_field_size=_MOST_LINE,
            auto_decompress=False,
        )

    def protocol(self) -> RequestHandler:
        """What a connection goes on with. The first bytes of it are given to its `data_received` after `connection_made`."""
        return self._server()

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._server.connections)

    async def aclose(self) -> None:
        """Close the connections. Idempotent."""
        await self._server.shutdown(_CLOSE_LIMIT)

    async def _answer(self, request: BaseRequest) -> web.StreamResponse:
        status, text, headers = await self._decide(request)
        if status != 202:
            self._desk.count(str(status))
        response = web.Response(status=status, body=text, headers=headers)
        if status in (408, 413):
            response.force_close()  # the rest of the body is not read
        return response

    async def _decide(self, request: BaseRequest) -> tuple[int, bytes, dict[str, str]]:
        desk = self._desk
        if request.method != "POST":
            return 405, b"", {"allow": "POST"}
        path = desk.path(request.raw_path)
        if path is None:
            return 404, NOT_FOUND, {}
        if request.content_type == STREAM_TYPE:
            return 505, b"a stream in the response body needs HTTP/2 all the way to the worker", {}
        facts = {name.lower(): value for name, value in request.headers.items()}
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(desk.config.arrival_timeout):
                async for chunk in request.content.iter_any():
                    if size + len(chunk) > desk.config.max_request:
                        return 413, b"request is larger than %d bytes" % desk.config.max_request, {}
                    desk.budget.take(len(chunk))
                    size += len(chunk)
                    chunks.append(chunk)
        except TimeoutError:
            return 408, b"the request did not arrive in time", {}
        except Overloaded:
            return 503, OVERLOADED, {}
        finally:
            desk.budget.give(size)
        return *push(desk, path, facts, b"".join(chunks)), {}
