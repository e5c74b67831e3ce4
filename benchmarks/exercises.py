"""What is measured between two processes of a contender, alternately with those of the others."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.children import ChildFailed
from benchmarks.contenders import Contender, Session, sessions
from benchmarks.report import Plan, Row, Samples

__all__ = ["ITEMS", "LATENCY", "REQUESTS", "Exercise", "measure", "throughput"]

_LIMIT = 60.0
"""Seconds a measure may take before its contender counts as hung."""


class Exercise(msgspec.Struct, frozen=True, kw_only=True):
    """A row and the orders that fill it, in full and in quick runs."""

    row: Row
    order: Mapping[str, Any]
    quick: Mapping[str, Any]
    rounds: int = 1
    """how often it is measured, alternately, in one repeat"""


def throughput(row: Row, *, items: int, concurrency: int, rounds: int = 1) -> Exercise:
    order = {"measure": "throughput", "items": items, "concurrency": concurrency}
    return Exercise(
        row=row,
        order=order | {"seconds": 2.0 / rounds, "warmup": 0.5 / rounds},
        quick=order | {"seconds": 0.25 / rounds, "warmup": 0.1 / rounds},
        rounds=rounds,
    )


_TIMES = ("p50_ms", "p99_ms")
ITEMS = throughput(
    Row(name="items", title="items/s, 64 streams × 128 items", metric="items_per_s", unit="1/s", beside=_TIMES),
    items=128,
    concurrency=64,
)
REQUESTS = throughput(
    Row(name="requests", title="requests/s, 1 item, 64 in flight", metric="requests_per_s", unit="1/s", beside=_TIMES),
    items=1,
    concurrency=64,
)
LATENCY = throughput(
    Row(name="latency", title="latency p50, 1 item, 1 in flight", metric="p50_ms", unit="ms", digits=3, beside=("p99_ms",)),
    items=1,
    concurrency=1,
    rounds=4,
)


def measure(
    exercises: Sequence[Exercise],
    contenders: Sequence[Contender],
    plan: Plan,
    unavailable: dict[str, str],
    places: Mapping[str, str] | None = None,
) -> Samples:
    """Measure all contenders that are not in `unavailable`; those that fail are put there. `places` are for their environments."""
    samples = Samples()
    for repeat in range(plan.repeats):
        with (
            tempfile.TemporaryDirectory(prefix="stator-bench-") as directory,
            sessions(contenders, Path(directory), unavailable, places) as running,
        ):
            _measure_repeat(exercises, repeat, running, plan, samples, unavailable)
    return samples


def _measure_repeat(
    exercises: Sequence[Exercise],
    repeat: int,
    running: list[Session],
    plan: Plan,
    samples: Samples,
    unavailable: dict[str, str],
) -> None:
    for exercise in exercises:
        for round_ in range(exercise.rounds):
            number = repeat * exercise.rounds + round_
            for session in _rotated(running, number):
                if session.contender.name not in unavailable:
                    _measure(exercise, number, session, plan, samples, unavailable)


def _measure(
    exercise: Exercise, number: int, session: Session, plan: Plan, samples: Samples, unavailable: dict[str, str]
) -> None:
    name = session.contender.name
    try:
        metrics = session.measure(exercise.quick if plan.quick else exercise.order, within=_LIMIT)
    except ChildFailed as failure:
        unavailable[name] = f"{exercise.row.name}: {failure}"
        samples.void(name)
    else:
        samples.add(exercise.row.name, name, number, metrics)


def _rotated(running: list[Session], by: int) -> list[Session]:
    """The same sessions, beginning with another one in each repeat."""
    start = by % len(running) if running else 0
    return running[start:] + running[:start]
