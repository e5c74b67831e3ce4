"""Receiving a request body: never more than the limit, never slower than agreed."""

from collections.abc import Generator
from contextlib import contextmanager

from aiohttp import web

from stator.errors import Overloaded
from stator.frontend.config import FrontendConfig
from stator.frontend.errors import Failure, Rejected
from stator.frontend.limit import Limit
from stator.tasks import DeadlineWheel

__all__ = ["BodyReader", "too_large"]


class BodyReader:
    """Receives all request bodies of the process within one budget of bytes."""

    def __init__(self, config: FrontendConfig) -> None:
        self._config = config
        self.held = 0
        """bytes of bodies now being received or parsed"""

    @contextmanager
    def reading(self, request: web.Request, wheel: DeadlineWheel) -> Generator["_Body"]:
        """Count what is received until the block ends, which should be when the body is parsed."""
        body = _Body(self, request, wheel)
        try:
            yield body
        finally:
            self.held -= body.size

    def charge(self, size: int) -> None:
        """Count `size` more bytes; `Overloaded` when the budget is spent."""
        self.held += size
        if self.held > self._config.body_budget:
            raise Overloaded(f"request bodies hold {self.held} bytes, {self._config.body_budget} are allowed")

    @property
    def config(self) -> FrontendConfig:
        return self._config


class _Body:
    def __init__(self, reader: BodyReader, request: web.Request, wheel: DeadlineWheel) -> None:
        self._reader = reader
        self._request = request
        self._wheel = wheel
        self._begin = wheel.now()
        self.size = 0

    async def read(self) -> bytes:
        """The whole body. Raises `Rejected` with 415, 413, 408 or 400; the rest of a refused body is discarded by aiohttp."""
        request, config = self._request, self._reader.config
        content = request.content
        _check_type(request)
        if (request.content_length or 0) > config.body_limit:
            raise too_large(config)
        chunks: list[bytes] = []
        try:
            if content.is_eof():  # it came with the head: no need of a deadline
                data = content.read_nowait()
                self._count(len(data))
                if content.at_eof():
                    return data
                chunks.append(data)
            with Limit(self._wheel, self._until):
                async for chunk in content.iter_any():
                    self._count(len(chunk))
                    chunks.append(chunk)
        except TimeoutError as error:
            text = f"The request body did not arrive in time: {self.size} bytes in {self._wheel.now() - self._begin:.0f} s."
            raise Rejected(Failure(status=408, message=text, code="request_timeout")) from error
        except web.RequestPayloadError as error:
            raise Rejected(Failure(status=400, message="The request body cannot be decoded.", code="bad_body")) from error
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _count(self, size: int) -> None:
        self.size += size
        self._reader.charge(size)
        if self.size > self._reader.config.body_limit:
            raise too_large(self._reader.config)

    def _until(self) -> float:
        config = self._reader.config
        return self._begin + config.body_timeout + self.size / config.body_rate


def too_large(config: FrontendConfig) -> Rejected:
    """413 with the limit in it."""
    text = f"The request body is larger than the limit of {config.body_limit} bytes."
    return Rejected(Failure(status=413, message=text, code="request_too_large"))


def _check_type(request: web.Request) -> None:
    if request.content_type.lower() == "application/json" and "Content-Type" in request.headers:
        return
    given = request.headers.get("Content-Type", "none")[:100]
    text = f"The Content-Type must be application/json, got {given}."
    raise Rejected(Failure(status=415, message=text, code="unsupported_media_type"))
