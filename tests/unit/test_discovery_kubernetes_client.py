"""Lines of a watch however its bytes are cut, and what the API server says about patience."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from email.utils import format_datetime, formatdate
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from stator.discovery import kubernetes_client
from stator.discovery.kubernetes_access import Credentials
from stator.discovery.kubernetes_client import EventLines, KubernetesClient
from stator.discovery.kubernetes_kubeconfig import Access
from stator.discovery.kubernetes_problem import ApiProblem
from stator.testing.manual_clock import ManualClock

CLOCK = ManualClock(wall=1_700_000_000.0)


class Chunks:
    """What `EventLines` uses of a stream."""

    def __init__(self, chunks: list[bytes], error: Exception | None = None) -> None:
        self._chunks = iter(chunks)
        self._error = error

    async def readany(self) -> bytes:
        if (chunk := next(self._chunks, b"")) or self._error is None:
            return chunk
        raise self._error


async def read_all(chunks: list[bytes], error: Exception | None = None) -> list[bytes]:
    lines = EventLines(Chunks(chunks, error))  # pyright: ignore[reportArgumentType]  # it needs nothing else
    found: list[bytes] = []
    while (batch := await lines.read()) is not None:
        found += batch
    return found


@given(st.lists(st.binary(min_size=1, max_size=20).filter(lambda line: b"\n" not in line)), st.data())
def test_lines_do_not_depend_on_how_bytes_are_cut(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(line + b"\n" for line in lines)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))) | {0, len(whole)})
    chunks = [whole[start:end] for start, end in itertools.pairwise(cuts) if start != end]
    assert asyncio.run(read_all(chunks)) == lines


async def test_an_unfinished_line_is_no_line() -> None:
    assert await read_all([b"one\ntw"]) == [b"one"]
    assert await read_all([]) == []


async def test_an_endless_line_ends_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_client, "_MAX_LINE", 100)
    assert await read_all([b"x" * 99 + b"\n", (b"y" * 60 + b"\n") * 10]) == [b"x" * 99, *[b"y" * 60] * 10]
    with pytest.raises(ApiProblem, match="longer than 100 bytes"):
        await read_all([b"x" * 50, b"x" * 51])


async def test_a_broken_connection_is_a_problem() -> None:
    with pytest.raises(ApiProblem, match="the watch broke") as caught:
        await read_all([b"one\n"], aiohttp.ClientPayloadError("cut"))
    assert caught.value.status == 0


# -- answers


@asynccontextmanager
async def answering(response: web.Response | None, **options: Any) -> AsyncIterator[KubernetesClient]:
    """A client of a server that answers always the same; None: never."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        if response is None:
            await asyncio.Event().wait()
        assert response is not None
        return web.Response(status=response.status, body=response.body, headers=response.headers)

    server = web.Server(handle)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client = KubernetesClient(url, Credentials(Access(server=url)), clock=CLOCK, **{"timeout": 5.0, **options})
    try:
        yield client
    finally:
        await client.aclose()
        listener.close()
        await server.shutdown(0.1)


async def problem_of(client: KubernetesClient) -> ApiProblem:
    with pytest.raises(ApiProblem) as caught:
        await client.get("/x", {})
    return caught.value


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("7", 7.0),
        (format_datetime(datetime.fromtimestamp(1_700_000_030, UTC), usegmt=True), 30.0),
        (formatdate(1_600_000_000, usegmt=True), 0.0),
        ("soon", None),
        ("-5", None),
        ("", None),
    ],
)
async def test_patience_is_a_number_or_a_date(text: str, seconds: float | None) -> None:
    async with answering(web.Response(status=429, headers={"Retry-After": text})) as client:
        problem = await problem_of(client)
        assert (problem.status, problem.retry_after) == (429, seconds)
        assert not problem.lasting


async def test_the_status_object_says_why() -> None:
    body = b'{"kind":"Status","message":"too many","details":{"retryAfterSeconds":3}}'
    async with answering(web.Response(status=503, body=body)) as client:
        problem = await problem_of(client)
        assert str(problem) == "503 too many"
        assert problem.retry_after == 3


@pytest.mark.parametrize("body", [b"", b"\xff", b"[]", b'{"message":5}', b"<html>"])
async def test_refusals_without_sense_are_refusals(body: bytes) -> None:
    async with answering(web.Response(status=403, body=body)) as client:
        problem = await problem_of(client)
        assert problem.lasting
        assert str(problem) == "403 Forbidden"


async def test_redirects_are_not_followed() -> None:
    """They would take the token to somebody else."""
    async with answering(web.Response(status=302, headers={"Location": "http://127.0.0.1:9/"})) as client:
        assert (await problem_of(client)).status == 302


async def test_silence_ends_a_request() -> None:
    async with answering(None, timeout=0.2) as client:
        assert "no answer within 0.2 s" in str(await problem_of(client))


async def test_answers_have_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes_client, "_MAX_ANSWER", 1000)
    async with answering(web.Response(body=b"x" * 1001)) as client:
        assert "longer than 1000 bytes" in str(await problem_of(client))


async def test_what_is_not_there_is_deleted() -> None:
    async with answering(web.Response(status=404)) as client:
        await client.delete("/x", b"")
