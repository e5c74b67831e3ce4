"""The measures, written once for every client. Needs the standard library only.

A client process calls `obey(measures_of(collect))` with its `collect`: send one request, return the list of all items of the
answer, the way a user of that runtime would write it. Orders come as lines of JSON on stdin, results leave as lines of JSON on
stdout. Every answer is compared with what it must be; a wrong one fails the measure.
"""

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

from benchmarks.children import resident_bytes
from benchmarks.handler import expected_items

__all__ = ["Collect", "Measure", "WrongAnswer", "drive", "measures_of", "obey", "quantile"]

Collect = Callable[[dict[str, Any]], Coroutine[Any, Any, list[Any]]]
Measure = Callable[..., Awaitable[dict[str, float]]]

_PROMPT = "x" * 100
_WARMUP_STREAMS = 100
_BATCH = 100
"""Streams opened at once: the question is what they cost, not how a burst is taken."""
_LARGE = 10_000_000
_POLL = 0.005
_OPENING_LIMIT = 120.0


class WrongAnswer(Exception):
    """An answer had other items than the handler sends."""


async def obey(measures: Mapping[str, Measure]) -> None:
    """Say that the client is ready, then carry out orders until stdin ends."""
    loop = asyncio.get_running_loop()
    _say({"ready": True})
    # A thread waits for the next order, and only between measures: the loop has nothing beside the work.
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        order = json.loads(line)
        try:
            _say(await measures[order.pop("measure")](**order))
        except Exception as error:
            _say({"error": f"{type(error).__name__}: {error}"})


def measures_of(collect: Collect) -> dict[str, Measure]:
    """The measures of a client that decodes items."""

    async def throughput(*, items: int, concurrency: int, seconds: float, warmup: float) -> dict[str, float]:
        return await measure_throughput(collect, items=items, concurrency=concurrency, seconds=seconds, warmup=warmup)

    async def paced(*, items: int, streams: int) -> dict[str, float]:
        return await measure_paced(collect, items=items, streams=streams)

    async def idle(*, streams: int) -> dict[str, float]:
        return await measure_idle(collect, streams=streams)

    async def large(*, way: str, rounds: int) -> dict[str, float]:
        return await measure_large(collect, way=way, rounds=rounds)

    return {"throughput": throughput, "paced": paced, "idle": idle, "large": large}


async def measure_throughput(
    collect: Collect, *, items: int, concurrency: int, seconds: float, warmup: float
) -> dict[str, float]:
    """`concurrency` callers, each with one request of `items` items in flight, for `seconds` after `warmup` seconds of it."""
    request, expected = {"n": items, "mode": "fast", "prompt": _PROMPT}, expected_items(items)

    async def call() -> float:
        began = time.perf_counter()
        answer = await collect(request)
        took = time.perf_counter() - began
        if answer != expected:
            raise WrongAnswer(_difference(answer, expected))
        return took

    await drive(call, concurrency=concurrency, seconds=warmup)
    latencies, elapsed = await drive(call, concurrency=concurrency, seconds=seconds)
    return throughput_result(latencies, elapsed, items)


async def drive(call: Callable[[], Awaitable[float]], *, concurrency: int, seconds: float) -> tuple[list[float], float]:
    """Callers that start a new call until `seconds` passed; returns all latencies, and the seconds until the last ended."""
    latencies: list[float] = []
    began = time.perf_counter()
    until = began + seconds

    async def caller() -> None:
        while time.perf_counter() < until:
            latencies.append(await call())

    await asyncio.gather(*(caller() for _ in range(concurrency)))
    return latencies, time.perf_counter() - began


def throughput_result(latencies: list[float], elapsed: float, items: int) -> dict[str, float]:
    """Rates per second, quantiles in ms."""
    latencies.sort()
    return {
        "requests": len(latencies),
        "requests_per_s": len(latencies) / elapsed,
        "items_per_s": len(latencies) * items / elapsed,
        "p50_ms": quantile(latencies, 0.5) * 1e3,
        "p99_ms": quantile(latencies, 0.99) * 1e3,
    }


async def measure_paced(collect: Collect, *, items: int, streams: int) -> dict[str, float]:
    """CPU seconds both processes spend while `streams` streams get `items` items each at the pace of the scheduler."""

    async def call(request: dict[str, Any], expected: list[Any]) -> float:
        began = time.perf_counter()
        answer = await collect(request)
        took = time.perf_counter() - began
        if answer != expected:
            raise WrongAnswer(_difference(answer, expected))
        return took

    async def round_of(n: int) -> list[float]:
        request, expected = {"n": n, "mode": "paced", "prompt": _PROMPT}, expected_items(n)
        return list(await asyncio.gather(*(call(request, expected) for _ in range(streams))))

    await round_of(max(1, items // 10))
    worker_before, client_before, began = await _census(collect), time.process_time(), time.perf_counter()
    latencies = await round_of(items)
    elapsed, client_after, worker_after = time.perf_counter() - began, time.process_time(), await _census(collect)
    worker, client = worker_after["cpu"] - worker_before["cpu"], client_after - client_before
    return paced_result(sorted(latencies), elapsed, tokens=items * streams, worker=worker, client=client)


def paced_result(latencies: list[float], elapsed: float, *, tokens: int, worker: float, client: float) -> dict[str, float]:
    """CPU in µs per token, quantiles of whole streams in ms."""
    return {
        "us_per_token": (worker + client) / tokens * 1e6,
        "worker_us": worker / tokens * 1e6,
        "client_us": client / tokens * 1e6,
        "tokens_per_s": tokens / elapsed,
        "p50_ms": quantile(latencies, 0.5) * 1e3,
        "p99_ms": quantile(latencies, 0.99) * 1e3,
    }


async def measure_idle(collect: Collect, *, streams: int) -> dict[str, float]:
    """Growth of resident memory per stream while `streams` streams are open and silent; each has a task that reads it.

    The warm-up opens and ends a hundred streams, so that code, pools and the first arenas are there before the first reading.
    """
    began = time.perf_counter()
    await _end_idle(collect, await _open_idle(collect, _WARMUP_STREAMS))
    client_before, worker_before = _own_memory(), (await _census(collect))["resident"]
    opening = time.perf_counter()
    tasks = await _open_idle(collect, streams)
    opened = time.perf_counter() - opening
    client_after, worker_after = _own_memory(), (await _census(collect))["resident"]
    await _end_idle(collect, tasks)
    return {
        "client_kb": (client_after - client_before) / streams / 1e3,
        "worker_kb": (worker_after - worker_before) / streams / 1e3,
        "opened_per_s": streams / opened,
        "seconds": time.perf_counter() - began,
    }


async def measure_large(collect: Collect, *, way: str, rounds: int) -> dict[str, float]:
    """Median times of exchanges with a text of 10 MB and of 30 MB in turn, `there` in the request or `back` as the item."""
    times: dict[int, list[float]] = {_LARGE: [], 3 * _LARGE: []}
    for done in range(rounds + 1):
        for size, took in times.items():
            there, back = (size, 1) if way == "there" else (1, size)
            request = {"n": back, "mode": "large", "prompt": "x" * there}
            began = time.perf_counter()
            (answer,) = await collect(request)
            if done:  # the first round warms up
                took.append(time.perf_counter() - began)
            if len(answer) != back:
                raise WrongAnswer(f"a text of {len(answer)} characters instead of {back}")
    ten, thirty = (statistics.median(took) for took in times.values())
    return {"growth": thirty / ten, "ten_ms": ten * 1e3, "thirty_ms": thirty * 1e3}


async def _open_idle(collect: Collect, streams: int) -> list[asyncio.Task[list[Any]]]:
    """Start the streams in batches and wait until the worker's handler runs for every one of them."""
    loop, tasks = asyncio.get_running_loop(), []
    until = time.monotonic() + _OPENING_LIMIT
    for first in range(0, streams, _BATCH):
        size = min(_BATCH, streams - first)
        tasks += [loop.create_task(collect({"n": 2, "mode": "idle", "prompt": _PROMPT})) for _ in range(size)]
        while (running := (await _census(collect))["idle"]) < len(tasks):
            if failed := next((task for task in tasks if task.done()), None):
                raise WrongAnswer(f"a stream that should be idle ended: {failed.exception() or failed.result()}")
            if time.monotonic() > until:
                raise WrongAnswer(f"only {running} of {len(tasks)} idle streams were open after {_OPENING_LIMIT:g} s")
            await asyncio.sleep(_POLL)
    return tasks


async def _end_idle(collect: Collect, tasks: list[asyncio.Task[list[Any]]]) -> None:
    """Release the streams; check that each brought both items and that the worker runs none any more."""
    (released,) = await collect({"n": 0, "mode": "release"})
    if released != {"released": len(tasks)}:
        raise WrongAnswer(f"{released} instead of {len(tasks)} streams")
    expected = expected_items(2)
    for task in tasks:
        if (answer := await task) != expected:
            raise WrongAnswer(_difference(answer, expected))
    until = time.monotonic() + 5.0
    while (left := (await _census(collect))["idle"]) and time.monotonic() < until:
        await asyncio.sleep(_POLL)
    if left:
        raise WrongAnswer(f"{left} handlers still run after their streams ended")


async def _census(collect: Collect) -> dict[str, Any]:
    (census,) = await collect({"n": 0, "mode": "census"})
    return census


def _own_memory() -> int:
    gc.collect()
    return resident_bytes()


def quantile(ordered: list[float], share: float) -> float:
    """The value below which `share` of an ordered, non-empty list lies."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def _difference(answer: list[Any], expected: list[Any]) -> str:
    if len(answer) != len(expected):
        return f"{len(answer)} items instead of {len(expected)}"
    index = next(i for i, (got, wanted) in enumerate(zip(answer, expected, strict=True)) if got != wanted)
    return f"item {index} is {answer[index]!r} instead of {expected[index]!r}"


def _say(message: Mapping[str, Any]) -> None:
    print(json.dumps(message), flush=True)
