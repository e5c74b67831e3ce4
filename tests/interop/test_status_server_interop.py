"""A worker of the reference and ours are asked the same by HTTP: pages, codes and bodies are the same, but for `DIFFERENCES`."""

import asyncio
import json
import os
import re
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientError, ClientSession, ClientTimeout

from interop.peers import discovery_root, needs_reference, peer, records_in
from interop.status_handler import CANARY, Patient
from stator.runtime import Context, Runtime

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

Asked = tuple[str, str, bytes]
"""method, path, body"""
Answered = tuple[int, str, str]
"""status, content type, body without what depends on the clock"""

REQUESTS: dict[str, Asked] = {
    "health": ("GET", "/health", b""),
    "live": ("GET", "/live", b""),
    "health by HEAD": ("HEAD", "/health", b""),
    "health by POST": ("POST", "/health", b""),
    "metrics by POST": ("POST", "/metrics", b""),
    "metadata": ("GET", "/metadata", b""),
    "nothing": ("GET", "/nothing", b""),
    "root": ("GET", "/", b""),
    "route": ("POST", "/engine/control/echo", b'{"a":[1,2]}'),
    "route by GET": ("GET", "/engine/control/echo", b""),
    "route by PUT": ("PUT", "/engine/control/echo", b"{}"),
    "route with a number": ("POST", "/engine/control/echo", b"17"),
    "route with null": ("POST", "/engine/control/echo", b"null"),
    "route that is no JSON": ("POST", "/engine/control/echo", b"nope"),
    "route that raises": ("POST", "/engine/fail", b""),
    "route that is none": ("POST", "/engine/control/nope", b""),
    "route with a slash": ("POST", "/engine/control/echo/", b""),
    "route without a name": ("POST", "/engine/", b""),
    "drain": ("GET", "/drain", b""),
    "loras": ("GET", "/v1/loras", b""),
}

DIFFERENCES: dict[str, tuple[Answered | None, str]] = {
    "route that is no JSON": (None, "the words of two JSON readers; the code and the kind of error are the same"),
    "drain": ((405, "", ""), "ours alone: the operator drains and resumes by POST"),
}
"""our answer, None for one that is compared up to its message, and why it is not the reference's"""


class Asker:
    """One worker's status server."""

    def __init__(self, session: ClientSession, url: str) -> None:
        self._session = session
        self._url = url

    async def __call__(self, method: str, path: str, body: bytes = b"") -> Answered:
        async with self._session.request(method, self._url + path, data=body or None) as answer:
            text = re.sub(r'"uptime":\{"secs":\d+,"nanos":\d+\}', '"uptime":0', (await answer.read()).decode())
            return answer.status, answer.headers.get("Content-Type", ""), text

    async def until(self, status: int, page: str = "") -> Answered:
        """The health page, once it has that status and `page` in it."""
        answer = None
        async with asyncio.timeout(20):
            while True:
                with suppress(ClientError):
                    answer = await self("GET", "/health")
                    if answer[0] == status and page in answer[2]:
                        return answer
                await asyncio.sleep(0.05)

    async def tell(self, route: str, **body: Any) -> None:
        assert (await self("POST", f"/engine/{route}", json.dumps(body).encode()))[0] == 200


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return discovery_root(tmp_path_factory)


def free_port() -> int:
    """The reference reads it as a signed 16-bit number, so those that the system would choose are too high."""
    for port in range(12_000 + os.getpid() % 10_000, 32_767):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


@asynccontextmanager
async def both(root: Path, ours: Path, *, payload: bool = False, canary: bool = False) -> AsyncIterator[tuple[Asker, Asker]]:
    """A worker of the reference and one of ours, set up alike."""
    port = await asyncio.to_thread(free_port)
    env = {"DYN_SYSTEM_PORT": str(port), "DYN_SYSTEM_HOST": "127.0.0.1", "PEER_PAYLOAD": "1" if payload else ""}
    if canary:
        env |= {"DYN_HEALTH_CHECK_ENABLED": "true", "DYN_CANARY_WAIT_TIME": "1", "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "1"}
    reference = peer("peer_status.py", root, **env)
    process = await asyncio.to_thread(reference.__enter__)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.to_thread, reference.__exit__, None, None, None)
        settings = {"health__canary": canary, "health__canary_wait": 1.0, "health__canary_timeout": 1.0, "health__port": 0}
        runtime = await stack.enter_async_context(
            Runtime.connect(plane="compatible", discovery="file", file__root=str(ours), **settings)
        )
        patient = Patient(runtime.health.set_system)
        for name, callback in patient.routes().items():
            runtime.engine_routes.register(name, callback)

        async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
            async for item in patient.generate(request):
                yield item

        endpoint = runtime.endpoint("demo.backend.generate")
        await stack.enter_async_context(endpoint.serving(generate, canary_payload=CANARY if payload else None))
        session = await stack.enter_async_context(ClientSession(timeout=ClientTimeout(total=10)))
        async with asyncio.timeout(20):
            while not await asyncio.to_thread(records_in, root):
                assert process.process.poll() is None, process.log()
                await asyncio.sleep(0.05)
        assert runtime.status_url is not None
        yield Asker(session, f"http://127.0.0.1:{port}"), Asker(session, runtime.status_url)


async def test_the_same_requests_get_the_same_answers(root: Path, tmp_path: Path) -> None:
    async with both(root, tmp_path) as (theirs, ours):
        for name, asked in REQUESTS.items():
            expected, found = await theirs(*asked), await ours(*asked)
            if name not in DIFFERENCES:
                assert found == expected, name
                continue
            different, reason = DIFFERENCES[name]
            assert found != expected, f"{name}: no difference any more; it was: {reason}"
            if different is None:
                read = [json.loads(text) for _, _, text in (expected, found)]
                assert (found[:2], list(read[0]), read[1]["error"]) == (expected[:2], list(read[1]), read[0]["error"]), name
            else:
                assert found == different, name


async def test_the_metrics_page_has_the_same_type(root: Path, tmp_path: Path) -> None:
    async with both(root, tmp_path) as askers:
        for ask in askers:
            status, kind, page = await ask("GET", "/metrics")
            assert (status, kind) == (200, "text/plain; charset=utf-8")
            assert re.search(r'^dynamo_component_uptime_seconds\{worker_id="[0-9a-f]+"\} \d', page, re.MULTILINE)


async def test_the_program_says_whether_it_is_well(root: Path, tmp_path: Path) -> None:
    async with both(root, tmp_path) as askers:
        seen: list[list[Answered]] = []
        for ask in askers:
            seen.append([await ask.until(503, "generate")])
            for ready in (True, False):
                await ask.tell("health", ready=ready)
                seen[-1].append(await ask.until(200 if ready else 503))
        assert seen[0] == seen[1]


@pytest.mark.parametrize(("payload", "canary"), [(True, False), (False, True)])
async def test_a_payload_makes_it_well_and_a_canary_without_one_never(
    root: Path, tmp_path: Path, payload: bool, canary: bool
) -> None:
    async with both(root, tmp_path, payload=payload, canary=canary) as (theirs, ours):
        status = 200 if payload else 503
        assert await theirs.until(status) == await ours.until(status)


@pytest.mark.parametrize("mood", ["hanging", "raising"])
async def test_a_canary_finds_the_same(root: Path, tmp_path: Path, mood: str) -> None:
    """Not answered yet, answered, sick, well again."""
    async with both(root, tmp_path, payload=True, canary=True) as askers:

        async def follow(ask: Asker) -> list[Answered]:
            seen = [await ask.until(200, "ready")]
            await ask.tell("mood", mood=mood)
            seen.append(await ask.until(503))
            await ask.tell("mood", mood="well")
            seen.append(await ask.until(200))
            return seen

        theirs, ours = await asyncio.gather(*(follow(ask) for ask in askers))
        assert theirs == ours
