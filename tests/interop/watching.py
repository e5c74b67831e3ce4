"""Processes that share a discovery, what a client of the reference knows at each moment, and scenarios that wait at the same time."""

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest

from interop.peers import REFERENCE
from stator.discovery.interface import Discovery
from stator.testing.discovery_suite import endpoint_record

__all__ = ["at_once", "come_stay_and_go", "process", "shown", "watcher"]

WATCHER = """
import asyncio, json, sys, uvloop
from dynamo.runtime import dynamo_worker
@dynamo_worker()
async def main(runtime):
    client = await runtime.endpoint(sys.argv[1]).client()
    shown = None
    while True:
        ids = sorted(client.instance_ids())
        if ids != shown:
            print(json.dumps(ids), flush=True)
            shown = ids
        await asyncio.sleep(0.02)
uvloop.install(); asyncio.run(main())
"""


@asynccontextmanager
async def process(variables: Mapping[str, str], *command: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A child with these variables, for requests over TCP; killed in the end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "STATOR_"))}
    environment |= {"DYN_REQUEST_PLANE": "tcp", "DYN_EVENT_PLANE": "zmq", "DYN_TCP_RPC_HOST": "127.0.0.1", **variables}
    child = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    try:
        yield child
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()


@asynccontextmanager
async def watcher(variables: Mapping[str, str], endpoint: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A client of the reference, which says whom it knows (`shown`)."""
    async with process(variables, str(REFERENCE), "-c", WATCHER, endpoint) as child:
        yield child


async def shown(watcher: asyncio.subprocess.Process, ids: set[int], *, within: float) -> float:
    """Wait until the reference's client knows exactly `ids`; the answer is how long that took."""
    assert watcher.stdout is not None
    began = time.monotonic()
    last = b""
    try:
        async with asyncio.timeout(within):
            while not last or set(json.loads(last)) != ids:
                last = await watcher.stdout.readline()
                assert last, "the reference's client ended"
    except TimeoutError:
        raise AssertionError(f"after {within} s the reference knows {last!r} instead of {ids}") from None
    return time.monotonic() - began


async def come_stay_and_go(
    variables: Mapping[str, str], endpoint: str, ours: AbstractAsyncContextManager[Discovery], *, longer: float
) -> None:
    """The reference's client sees instances of ours register, stay for `longer` (seconds, more than it keeps what gives no sign of
    life), and leave."""
    one, other = endpoint_record(2**64 - 1, endpoint), endpoint_record(7, endpoint)
    async with watcher(variables, endpoint) as client:
        async with ours as discovery:
            await discovery.register(one)
            await shown(client, {one.instance_id}, within=40)
            await discovery.register(other)
            assert await shown(client, {one.instance_id, other.instance_id}, within=5) < 1
            await discovery.unregister(one.key)
            assert await shown(client, {other.instance_id}, within=5) < 1
            with pytest.raises(AssertionError, match="instead of"):
                await shown(client, set(), within=longer)
        await shown(client, set(), within=5)


@asynccontextmanager
async def at_once(
    scenarios: Mapping[str, Coroutine[Any, Any, None]],
) -> AsyncIterator[Mapping[str, "asyncio.Task[None]"]]:
    """All of them, begun. Each waits for things to expire, and they wait at the same time."""
    tasks = {name: asyncio.create_task(scenario, name=name) for name, scenario in scenarios.items()}
    try:
        yield tasks
    finally:
        for task in tasks.values():
            task.cancel()
        await asyncio.gather(*tasks.values(), return_exceptions=True)
