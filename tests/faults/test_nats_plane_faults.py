"""What becomes of requests when NATS goes away, stands still, comes back: accepted ones go on, new ones fail fast, all is well 2 s later.

Scaled: 3 s for an outage of 30.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stator.errors import ConnectFailed, Disconnected, StatorError
from stator.events import Channel
from stator.runtime import Client, Context, Runtime
from stator.testing.nats_server import NatsServer, nats_server
from stator.testing.plane_suite import eventually

pytestmark = pytest.mark.timeout(60)

OUTAGE = 3.0
FAST = 1.0
BACK = 2.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NatsServer]:
    with nats_server(tmp_path / "nats") as running:
        yield running


async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request["n"]):
        yield number
        await asyncio.sleep(request.get("pause", 0))


@asynccontextmanager
async def cluster(*servers: NatsServer, root: Path, **settings: Any) -> AsyncGenerator[Client, None]:
    """A worker that takes requests by NATS, and a client."""
    common: dict[str, Any] = {
        "discovery": "file",
        "file__root": str(root),
        "plane": "compatible",
        "nats__servers": tuple(server.url for server in servers),
        **settings,
    }
    async with (
        Runtime.connect(request_plane="nats", **common) as there,
        Runtime.connect(**common) as here,
        there.endpoint("demo.backend.generate").serving(generate),
    ):
        client = await here.endpoint("demo.backend.generate").client()
        await client.wait_for_instances()
        assert await client.generate({"n": 1}).collect() == [0]
        yield client


async def outcome(client: Client, **options: Any) -> tuple[StatorError | None, float]:
    """How a small request ended, and after how many seconds."""
    began = time.monotonic()
    try:
        assert await client.generate({"n": 3}, **options).collect() == [0, 1, 2]
    except StatorError as error:
        return error, time.monotonic() - began
    return None, time.monotonic() - began


async def back_within(client: Client, seconds: float) -> None:
    """Requests succeed again, soon, and from then on."""
    began = time.monotonic()
    while (await outcome(client))[0] is not None:
        assert time.monotonic() - began < seconds
        await asyncio.sleep(0.02)
    for _ in range(20):
        assert (await outcome(client))[0] is None


async def test_accepted_requests_go_on_without_nats_and_new_ones_fail_fast(server: NatsServer, tmp_path: Path) -> None:
    async with cluster(server, root=tmp_path / "root") as client:
        running = [client.generate({"n": 100, "pause": OUTAGE / 80}) for _ in range(20)]
        reading = [asyncio.get_running_loop().create_task(each.collect()) for each in running]
        await eventually(lambda: all(each.instance_id for each in running), what="all are on their way")
        for each in running:
            await eventually(lambda each=each: each._inbox is not None and each._inbox.delivered, what="all were accepted")  # type: ignore[misc]
        await asyncio.to_thread(server.stop)
        end = time.monotonic() + OUTAGE
        failures = 0
        while time.monotonic() < end:
            error, took = await outcome(client)
            assert isinstance(error, Disconnected), error  # ConnectFailed, but for one that was on its way
            assert error.retryable
            assert took < FAST
            failures += 1
            await asyncio.sleep(0.05)
        assert failures > 10
        await asyncio.to_thread(server.start)
        await back_within(client, BACK)
        for each in reading:
            assert await each == list(range(100))


async def test_requests_under_way_when_nats_ends_are_answered_or_fail_soon(server: NatsServer, tmp_path: Path) -> None:
    async with cluster(server, root=tmp_path / "root") as client:
        loop = asyncio.get_running_loop()
        reading = [loop.create_task(outcome(client)) for _ in range(300)]
        await asyncio.sleep(0.01)  # so that some are answered, and others not yet sent
        await asyncio.to_thread(server.stop)
        ended = await asyncio.gather(*reading)
        assert all(took < FAST + 1 for _, took in ended)
        assert all(error is None or error.retryable for error, _ in ended)


async def test_a_server_that_is_back_at_once_costs_no_request(
    server: NatsServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that finds NATS gone waits a moment for it. (One that was written to the connection as it ended is lost.)"""
    async with cluster(server, root=tmp_path / "root", nats__reconnect_first=0.02, nats__reconnect_most=0.05) as client:
        for number in range(3):
            await asyncio.to_thread(server.stop)
            restarting = asyncio.get_running_loop().create_task(asyncio.to_thread(server.start))
            await eventually(lambda n=number: caplog.text.count("requests over NATS fail") > n, what="it was noticed")  # type: ignore[misc]
            error, _ = await outcome(client)
            await restarting
            assert error is None


async def test_a_server_that_stands_still_is_noticed(server: NatsServer, tmp_path: Path) -> None:
    async with cluster(server, root=tmp_path / "root", nats__connect_timeout=0.5) as client:
        with server.standing_still():
            error, took = await outcome(client)
            assert error is not None
            assert error.retryable
            assert took < 5
            end = time.monotonic() + OUTAGE
            while time.monotonic() < end:
                error, took = await outcome(client)
                assert isinstance(error, ConnectFailed), error
                assert took < FAST
                await asyncio.sleep(0.05)
        await back_within(client, BACK)


async def test_a_worker_that_was_idle_all_the_time_listens_again(server: NatsServer, tmp_path: Path) -> None:
    async with cluster(server, root=tmp_path / "root") as client:
        for _ in range(3):
            await asyncio.to_thread(server.stop)
            await asyncio.sleep(0.5)  # the outage
            await asyncio.to_thread(server.start)
            await back_within(client, BACK)


async def test_a_login_that_changes_is_no_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    path = tmp_path / "nats"

    def settings(password: str) -> dict[str, str]:
        return {"authorization": f"{{ user: me, password: {password} }}"}

    with nats_server(path, settings=settings("first")) as server:
        login = {"nats__auth_username": "me", "nats__auth_password": "first"}
        async with cluster(server, root=tmp_path / "root", **login) as client:
            port = server.port
            await asyncio.to_thread(server.stop)
            other = NatsServer(path, settings=settings("second"), port=port)
            await asyncio.to_thread(other.start)
            try:
                await eventually(lambda: "Authorization Violation" in caplog.text, what="the refusal is said")
                planes: Any = client._services.network._clients  # pyright: ignore[reportPrivateUsage]
                await eventually(lambda: planes["nats"].connection.away_for > 0.5, what="it is no blink any more")
                error, took = await outcome(client)
                assert isinstance(error, ConnectFailed)
                assert "Authorization Violation" in error.message
                assert took < FAST
            finally:
                await asyncio.to_thread(other.stop)
            await asyncio.to_thread(server.start)
            await back_within(client, BACK)
    assert "'first'" not in caplog.text
    assert "password: first" not in caplog.text


async def test_a_cluster_loses_a_server_and_no_request(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(nats_server(tmp_path / "a", settings=clustered("a")))
        second = stack.enter_context(nats_server(tmp_path / "b", settings=clustered("b", first)))
        async with cluster(first, second, root=tmp_path / "root") as client:
            stopped = 0
            for victim in (first, second, first):
                failed: list[StatorError] = []

                async def load(failed: list[StatorError] = failed) -> None:
                    while True:
                        error, _ = await outcome(client)
                        if error is not None:
                            failed.append(error)
                        await asyncio.sleep(0.01)

                loading = asyncio.get_running_loop().create_task(load())
                await asyncio.to_thread(victim.stop)
                await asyncio.sleep(1.0)  # the outage
                await asyncio.to_thread(victim.start)
                await met(victim)
                await asyncio.sleep(0.5)  # under load
                loading.cancel()
                stopped += 1
                assert len(failed) <= 2, failed  # what was on its way in the server that ended, and could not be sent twice
            assert stopped == 3


async def met(server: NatsServer) -> None:
    """It and another of its cluster have found each other since it was started."""
    await eventually(lambda: b"Route connection created" in server.written(), within=10, what="the two find each other again")


def clustered(name: str, other: NatsServer | None = None) -> dict[str, str]:
    """A server of a cluster; the first of them gets a port that the others are told."""
    routes = "" if other is None else f"routes: [ nats://127.0.0.1:{other.cluster_port} ]"
    return {"server_name": name, "cluster": f"{{ name: test, listen: 127.0.0.1:-1, {routes} }}"}


async def test_requests_over_tcp_do_not_notice_that_nats_events_are_away(server: NatsServer, tmp_path: Path) -> None:
    common: dict[str, Any] = {"discovery": "file", "file__root": str(tmp_path / "root"), "event_plane": "nats"}
    common |= {"plane": "compatible", "nats__servers": (server.url,)}
    async with (
        Runtime.connect(**common) as there,
        Runtime.connect(**common) as here,
        there.endpoint("demo.backend.generate").serving(generate),
    ):
        client = await here.endpoint("demo.backend.generate").client()
        await client.wait_for_instances()
        async with await there.events.publisher(Channel(namespace="demo", topic="kv_metrics")) as publisher:
            await asyncio.to_thread(server.stop)
            end = time.monotonic() + OUTAGE
            while time.monotonic() < end:
                publisher.publish(b"load")
                assert (await outcome(client))[0] is None
                await asyncio.sleep(0.01)
            assert publisher.statistics().queued > 10


async def test_all_workers_are_used_again_when_nats_is_back(server: NatsServer, tmp_path: Path) -> None:
    """Not to be reached was not their fault."""
    common: dict[str, Any] = {"discovery": "file", "file__root": str(tmp_path / "root"), "nats__servers": (server.url,)}
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(3):
            worker = await stack.enter_async_context(Runtime.connect(plane="compatible", request_plane="nats", **common))
            await stack.enter_async_context(worker.endpoint("demo.backend.generate").serving(generate))
        here = await stack.enter_async_context(Runtime.connect(plane="compatible", **common))
        client = await here.endpoint("demo.backend.generate").client()
        await client.wait_for_instances(3)
        await asyncio.to_thread(server.stop)
        end = time.monotonic() + OUTAGE
        while time.monotonic() < end:
            await outcome(client)
            await asyncio.sleep(0.02)
        await asyncio.to_thread(server.start)
        await asyncio.sleep(BACK)  # all of them have to be back then
        used: set[int] = set()
        for _ in range(9):
            stream = client.generate({"n": 1})
            assert await stream.collect() == [0]
            used.add(stream.instance_id)
        assert len(used) == 3
