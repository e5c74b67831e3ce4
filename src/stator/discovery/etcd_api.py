"""etcd through its JSON gateway: one call is one POST, a watch is a POST whose answer does not end.

All calls go to one member, the one *in use*. A member that does not answer in time, or cannot serve, is left for the next one;
the watches on it are cut then, so that their readers follow. Whether it was etcd that said no (`Refused`) or nobody who could
(`Unreachable`) is decided by HTTP and gRPC codes (`stator.discovery.etcd_problem`); no text is looked into.
"""

import asyncio
import logging
import ssl
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from stator.clock import Clock
from stator.discovery.etcd_config import EtcdConfig
from stator.discovery.etcd_messages import Authenticated, Problem, WatchAnswer, WatchLine
from stator.discovery.etcd_problem import (
    ALREADY_THERE,
    STALE_TOKEN,
    Refused,
    Trouble,
    Unreachable,
    check_answer,
    text_of,
    trouble_of,
)
from stator.discovery.etcd_tls import changed_context
from stator.errors import ConfigError
from stator.tasks import Backoff

__all__ = ["EtcdApi", "WatchStream"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CALLS_AT_ONCE = 16
_MAX_ANSWER = 64 * 2**20
"""bytes of an answer, or of a message of a watch; etcd's own requests end at 1.5 MiB, and ranges are read in pages"""


class WatchStream:
    """The messages of one watch. Iteration raises `Unreachable` when the connection ends, and when `close` is called."""

    def __init__(self, response: aiohttp.ClientResponse, endpoint: str) -> None:
        self.endpoint = endpoint
        self._response = response
        self._decoder = msgspec.json.Decoder(WatchLine, strict=False)
        self._lines: list[bytes] = []
        self._begun: list[bytes] = []
        self._size = 0

    def close(self) -> None:
        """Cut the connection. Idempotent."""
        self._response.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> WatchAnswer:
        """Cancelling it loses nothing but may leave the stream in the middle of a message."""
        while not self._lines:
            self._feed(await self._response.content.readany())
        line = self._decoder.decode(self._lines.pop())
        if line.result is None:
            raise Unreachable(f"{self.endpoint}: {text_of(line.error or Problem())}")
        return line.result

    def _feed(self, chunk: bytes) -> None:
        if not chunk:
            raise Unreachable(f"{self.endpoint}: the watch ended")
        first, *rest = chunk.split(b"\n")
        self._begun.append(first)
        self._size += len(first)
        if self._size > _MAX_ANSWER:
            raise Unreachable(f"{self.endpoint}: a message of the watch is longer than {_MAX_ANSWER} bytes")
        if rest:
            lines = [b"".join(self._begun), *rest[:-1]]
            self._begun, self._size = [rest[-1]], len(rest[-1])
            self._lines = [line for line in reversed(lines) if line.strip()]


class EtcdApi:
    """Calls to the members of one cluster. Made inside the event loop; `aclose` once."""

    def __init__(
        self,
        config: EtcdConfig,
        *,
        context: ssl.SSLContext | None,
        file_times: tuple[float, ...] = (),
        clock: Clock,
        random: Random,
    ) -> None:
        """`file_times` are those of the certificates in `context`: they are read again when nobody answers and they have changed."""
        self.endpoints = config.urls
        self._config = config
        self._clock = clock
        self._random = random
        self._backoff = Backoff(first=config.reconnect_first, most=config.reconnect_most)
        self._current = random.randrange(len(self.endpoints))
        self._streams: set[WatchStream] = set()
        self._calls = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._login = asyncio.Lock()
        self._token = ""
        self._no_users = False
        self._moved = False
        self._closed = False
        self._context = context
        self._file_times = file_times
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=config.connect_timeout),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    @property
    def endpoint(self) -> str:
        """The member in use."""
        return self.endpoints[self._current]

    async def aclose(self) -> None:
        """Cut every connection; calls end with `Unreachable`."""
        self._closed = True
        for stream in tuple(self._streams):
            stream.close()
        await self._session.close()

    async def call(
        self, path: str, body: Mapping[str, Any], kind: type[T], *, within: float | None = None, each: float | None = None
    ) -> T:
        """Ask the member in use, then the others: in rounds for `within` seconds, or one round without. `each` bounds a member's time.

        Raises `Refused` and `Unreachable`. After `Unreachable`, or cancelled, it may have been done all the same.
        """
        data = msgspec.json.encode(body)
        deadline = None if within is None else self._clock.monotonic() + within
        attempt = 0
        while True:
            troubles = await self._round(path, data, kind, deadline, each or self._config.request_timeout)
            if not isinstance(troubles, dict):
                return troubles.value
            if self._context is not None:
                await self._read_certificates_again()
            delay = self._backoff.delay(attempt, self._random)
            attempt += 1
            if self._closed or deadline is None or self._clock.monotonic() + delay >= deadline:
                text = "; ".join(f"{endpoint}: {trouble}" for endpoint, trouble in troubles.items())
                raise Unreachable(
                    text or "no time left", hopeless=bool(troubles) and all(t.hopeless for t in troubles.values())
                )
            await asyncio.sleep(delay)

    async def _round(
        self, path: str, data: bytes, kind: type[T], deadline: float | None, each: float
    ) -> "_Done | dict[str, Trouble]":
        """Ask each member once; what came of it, or why nothing did."""
        troubles: dict[str, Trouble] = {}
        for _ in self.endpoints:
            seconds = each if deadline is None else min(each, deadline - self._clock.monotonic())
            if seconds <= 0:
                break
            endpoint = self.endpoint
            try:
                async with self._calls:
                    answer = await self._ask(endpoint, path, data, seconds)
                    done = _Done(msgspec.json.decode(answer, type=kind, strict=False))
            except (Trouble, msgspec.MsgspecError) as error:
                trouble = error if isinstance(error, Trouble) else Trouble(f"an answer that makes no sense: {error}")
                troubles[endpoint] = trouble
                self._leave(endpoint, trouble)
            else:
                self._moved = False
                return done
        return troubles

    async def _ask(self, endpoint: str, path: str, data: bytes, seconds: float) -> bytes:
        try:
            async with asyncio.timeout(seconds):
                return await self._ask_as_user(endpoint, path, data)
        except TimeoutError as error:
            raise Trouble(f"no answer within {seconds:.3g} s") from error

    async def _ask_as_user(self, endpoint: str, path: str, data: bytes) -> bytes:
        token = await self._log_in(endpoint)
        try:
            return await self._post(endpoint, path, data, token)
        except Refused as error:
            if not self._config.username or error.code not in STALE_TOKEN:
                raise
            if token == self._token:  # it has expired, or the member has forgotten it, or users have changed
                self._token, self._no_users = "", False
            return await self._post(endpoint, path, data, await self._log_in(endpoint))

    async def _log_in(self, endpoint: str) -> str:
        """A token for the user; "" without one. Raises `Refused` and `Trouble`."""
        if not self._config.username:
            return ""
        async with self._login:
            if not self._token and not self._no_users:
                body = {"name": self._config.username, "password": self._config.password.reveal()}
                try:
                    answer = await self._post(endpoint, "/v3/auth/authenticate", msgspec.json.encode(body), "")
                    self._token = msgspec.json.decode(answer, type=Authenticated, strict=False).token
                except Refused as error:
                    if error.code != ALREADY_THERE:
                        raise Refused(
                            f"the log-in as {self._config.username!r} was refused ({error}); look at etcd.username and etcd.password "
                            "(ETCD_AUTH_USERNAME, ETCD_AUTH_PASSWORD)",
                            code=error.code,
                        ) from error
                    self._no_users = True
                    logger.info("etcd has no users enabled; the log-in as %r is left out", self._config.username)
            return self._token

    async def _post(self, endpoint: str, path: str, data: bytes, token: str) -> bytes:
        try:
            try:
                status, answer = await self._exchange(endpoint, path, data, token)
            except aiohttp.ServerDisconnectedError:  # a connection that had waited for us; a fresh one may do
                status, answer = await self._exchange(endpoint, path, data, token)
        except (aiohttp.ClientError, OSError) as error:
            raise trouble_of(error, endpoint) from error
        check_answer(endpoint, status, answer)
        return answer

    async def _exchange(self, endpoint: str, path: str, data: bytes, token: str) -> tuple[int, bytes]:
        if self._closed:
            raise Trouble("the discovery is closed")
        async with self._request(endpoint, path, data, token) as response:
            return response.status, await _read(response)

    def _request(self, endpoint: str, path: str, data: bytes, token: str) -> Any:
        # hasleader: a member that lost the others says so instead of keeping a watch silent
        headers = {"Content-Type": "application/json", "Grpc-Metadata-hasleader": "true"}
        if token:
            headers["Authorization"] = token
        server_name = self._config.server_name or None
        return self._session.post(
            f"{endpoint}{path}",
            data=data,
            headers=headers,
            ssl=self._context if self._context is not None else True,
            server_hostname=server_name,
            allow_redirects=False,
        )

    async def _read_certificates_again(self) -> None:
        """If their files have changed; connections that are open keep what they have."""
        try:
            context, self._file_times = await asyncio.to_thread(changed_context, self._config, self._file_times)
        except ConfigError as error:
            logger.warning("certificates for etcd have changed and cannot be used: %s", error)
            return
        if context is not None:
            self._context = context
            logger.info("certificates for etcd were read again")

    @asynccontextmanager
    async def watch(self, fields: Mapping[str, Any]) -> AsyncGenerator[WatchStream, None]:
        """A watch on the member in use; `fields` are those of its `create_request`. Nobody else is tried.

        Raises `Refused` and `Unreachable`; the member is left then, and also when the stream breaks inside the block.
        """
        endpoint = self.endpoint
        data = msgspec.json.encode({"create_request": fields})
        try:
            async with asyncio.timeout(self._config.request_timeout):
                response = await self._open(endpoint, data)
        except TimeoutError as error:
            raise self._left(endpoint, Trouble("no answer to a watch in time")) from error
        except (aiohttp.ClientError, OSError) as error:
            raise self._left(endpoint, trouble_of(error, endpoint)) from error
        except Trouble as error:
            raise self._left(endpoint, error) from error
        stream = WatchStream(response, endpoint)
        self._streams.add(stream)
        try:
            yield stream
        except (aiohttp.ClientError, OSError, msgspec.MsgspecError) as error:
            raise self._left(endpoint, trouble_of(error, endpoint)) from error
        except Unreachable as error:
            self._left(endpoint, Trouble("a watch ended"))
            raise error
        finally:
            self._streams.discard(stream)
            stream.close()

    async def _open(self, endpoint: str, data: bytes) -> aiohttp.ClientResponse:
        token = await self._log_in(endpoint)
        if self._closed:
            raise Trouble("the discovery is closed")
        response: aiohttp.ClientResponse = await self._request(endpoint, "/v3/watch", data, token)
        try:
            if response.status != 200:
                check_answer(endpoint, response.status, await _read(response))
        except BaseException:
            response.close()
            raise
        return response

    def _left(self, endpoint: str, trouble: Trouble) -> Unreachable:
        self._leave(endpoint, trouble)
        return Unreachable(f"{endpoint}: {trouble}", hopeless=trouble.hopeless)

    def _leave(self, endpoint: str, trouble: Trouble) -> None:
        """Use another member from now on, if there is one and this has not happened yet."""
        if endpoint != self.endpoint or len(self.endpoints) == 1:
            return
        self._current = (self._current + 1) % len(self.endpoints)
        log = logger.debug if self._moved else logger.info  # once until somebody answers
        log("etcd member %s: %s; %s is asked from now on", endpoint, trouble, self.endpoint)
        self._moved = True
        for stream in tuple(self._streams):
            if stream.endpoint == endpoint:
                stream.close()


class _Done(msgspec.Struct):
    value: Any


async def _read(response: aiohttp.ClientResponse) -> bytes:
    parts: list[bytes] = []
    size = 0
    async for chunk in response.content.iter_any():
        parts.append(chunk)
        size += len(chunk)
        if size > _MAX_ANSWER:
            raise Trouble(f"an answer longer than {_MAX_ANSWER} bytes")
    return b"".join(parts)
