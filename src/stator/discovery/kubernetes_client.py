"""Requests to the API server over aiohttp: read a collection, follow it, apply an object, delete it. Nothing is retried here.

Only imported when a discovery is opened, as it brings an HTTP client along.
"""

import asyncio
import email.utils
import io
import ssl
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from stator.clock import Clock
from stator.discovery.kubernetes_access import Credentials, Ticket
from stator.discovery.kubernetes_problem import ApiProblem

__all__ = ["EventLines", "KubernetesClient"]

_MAX_ANSWER = 256 * 2**20
"""bytes of one answer; 500 objects of the largest size that etcd takes are more, but then pages can be made smaller"""
_MAX_LINE = 8 * 2**20
"""bytes of one watch event; etcd takes objects of 1.5 MiB"""
_LARGE = 2**20
"""bytes of a body that is sent in pieces"""
_MAX_REFUSAL = 64 * 1024
_APPLY = "application/apply-patch+yaml"


class _Details(msgspec.Struct, frozen=True):
    retryAfterSeconds: float = 0


class _Refusal(msgspec.Struct, frozen=True):
    """A `Status` object."""

    message: str = ""
    details: _Details | None = None


_refusals = msgspec.json.Decoder(_Refusal)


class EventLines:
    """The lines of a watch as they come."""

    def __init__(self, content: aiohttp.StreamReader) -> None:
        self._content = content
        self._rest = bytearray()

    async def read(self) -> list[bytes] | None:
        """The complete lines of the next chunk, maybe none; None when the server has ended the watch. Raises `ApiProblem`.

        Cancelled: nothing is lost.
        """
        try:
            chunk = await self._content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise ApiProblem(f"the watch broke: {_text(error)}") from error
        if not chunk:
            return None
        head, newline, tail = chunk.rpartition(b"\n")
        if len(tail) + (0 if newline else len(self._rest)) > _MAX_LINE:
            raise ApiProblem(f"a watch event is longer than {_MAX_LINE} bytes")
        if not newline:
            self._rest += chunk
            return []
        whole = bytes(self._rest + head)
        self._rest = bytearray(tail)
        return [line for line in whole.split(b"\n") if line]


class KubernetesClient:
    """One process' connections to the API server. Methods raise `ApiProblem`, watches aside after `timeout` seconds of silence."""

    def __init__(self, server: str, credentials: Credentials, *, server_name: str = "", timeout: float, clock: Clock) -> None:
        self.server = server
        self._credentials = credentials
        self._server_name = server_name or None
        self._timeout = timeout
        self._clock = clock
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=16, keepalive_timeout=60.0),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            headers={"User-Agent": "stator"},
        )

    async def aclose(self) -> None:
        """Close every connection. Idempotent."""
        await self._session.close()

    async def get(self, path: str, params: Mapping[str, str]) -> bytes:
        """The answer's body."""
        return await self._call("GET", path, params)

    async def apply(self, path: str, params: Mapping[str, str], body: bytes) -> bytes:
        """Server-side apply; the answer is the object as it is now."""
        return await self._call("PATCH", path, params, body, content_type=_APPLY)

    async def delete(self, path: str, body: bytes) -> None:
        """Delete an object; one that is not there is as good."""
        try:
            await self._call("DELETE", path, {}, body)
        except ApiProblem as problem:
            if problem.status != 404:
                raise

    @asynccontextmanager
    async def watch(self, path: str, params: Mapping[str, str]) -> AsyncGenerator[EventLines, None]:
        """Open a watch; the block is entered when the server has agreed. Has no time limit of its own."""
        async with self._request("GET", path, params, None, None) as response:
            try:
                yield EventLines(response.content)
            finally:
                response.close()

    async def _call(
        self, method: str, path: str, params: Mapping[str, str], body: bytes | None = None, content_type: str | None = None
    ) -> bytes:
        loop = asyncio.get_running_loop()
        try:
            async with (
                asyncio.timeout(self._timeout) as limit,
                self._request(method, path, params, body, content_type) as response,
            ):
                return await _read(response, _MAX_ANSWER, lambda: limit.reschedule(loop.time() + self._timeout))
        except TimeoutError as error:
            raise ApiProblem(f"no answer within {self._timeout:g} s") from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise ApiProblem(_text(error)) from error

    @asynccontextmanager
    async def _request(
        self, method: str, path: str, params: Mapping[str, str], body: bytes | None, content_type: str | None
    ) -> AsyncGenerator[aiohttp.ClientResponse, None]:
        """A response of status 2xx. A refused token is read again once: it may have been exchanged just now."""
        for renew in (False, True):
            ticket = await asyncio.to_thread(self._credentials.current, renew=renew)
            try:
                response = await self._session.request(
                    method,
                    self.server + path,
                    params=params,
                    data=io.BytesIO(body) if body is not None and len(body) > _LARGE else body,
                    headers=_headers(ticket, content_type),
                    ssl=ticket.context if ticket.context is not None else True,
                    server_hostname=self._server_name if ticket.context is not None else None,
                    allow_redirects=False,
                )
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise ApiProblem(_text(error)) from error
            async with response:
                if response.status == 401 and not renew:
                    continue
                if not 200 <= response.status < 300:
                    raise await self._refusal(response)
                yield response
                return

    async def _refusal(self, response: aiohttp.ClientResponse) -> ApiProblem:
        try:
            async with asyncio.timeout(self._timeout):
                body = await _read(response, _MAX_REFUSAL)
        except (ApiProblem, TimeoutError, aiohttp.ClientError, OSError):
            body = b""
        try:
            refusal = _refusals.decode(body)
        except (msgspec.MsgspecError, ValueError):
            refusal = _Refusal()
        patience = self._patience(response.headers.get("Retry-After", ""))
        if patience is None and refusal.details is not None and refusal.details.retryAfterSeconds > 0:
            patience = refusal.details.retryAfterSeconds
        text = refusal.message or response.reason or "no reason given"
        return ApiProblem(f"{response.status} {text}", status=response.status, retry_after=patience)

    def _patience(self, text: str) -> float | None:
        """Seconds that a `Retry-After` asks for: it is a number or a date."""
        try:
            if text.strip().isdigit():
                return float(text)
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - self._clock.wall())
        except (ValueError, TypeError, OverflowError):
            return None


async def _read(response: aiohttp.ClientResponse, limit: int, heard: Callable[[], None] = lambda: None) -> bytes:
    """The whole body; `heard()` is called for each piece of it."""
    body = bytearray()
    async for chunk in response.content.iter_any():
        heard()
        body += chunk
        if len(body) > limit:
            raise ApiProblem(f"an answer is longer than {limit} bytes")
    return bytes(body)


def _headers(ticket: Ticket, content_type: str | None) -> dict[str, str]:
    headers = {"Accept": "application/json", "Content-Type": content_type or "application/json"}
    if ticket.token:
        headers["Authorization"] = f"Bearer {ticket.token.reveal()}"
    return headers


def _text(error: Exception) -> str:
    """What happened, without request headers."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return f"TLS: {error.certificate_error}"
    if isinstance(error, ssl.SSLError | aiohttp.ClientSSLError):
        return f"TLS: {error}"
    return str(error) or type(error).__name__
