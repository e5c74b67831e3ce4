"""How fast do two processes stream to each other: rates, latency, CPU per token, for every runtime and plane."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from benchmarks.children import ChildFailed
from benchmarks.contenders import FLOOR, REFERENCES, RUNTIMES, Session, choose, sessions
from benchmarks.report import Plan, Report, Row, Samples, Target

__all__ = ["answer"]

_LIMIT = 60.0
"""Seconds a measure may take before its contender counts as hung."""


class _Exercise(msgspec.Struct, frozen=True, kw_only=True):
    """A row and the orders that fill it, in full and in quick runs."""

    row: Row
    order: Mapping[str, Any]
    quick: Mapping[str, Any]
    rounds: int = 1
    """how often it is measured, alternately, in one repeat"""


def _throughput(row: Row, *, items: int, concurrency: int, rounds: int = 1) -> _Exercise:
    order = {"measure": "throughput", "items": items, "concurrency": concurrency}
    return _Exercise(
        row=row,
        order=order | {"seconds": 2.0 / rounds, "warmup": 0.5 / rounds},
        quick=order | {"seconds": 0.25 / rounds, "warmup": 0.1 / rounds},
        rounds=rounds,
    )


_TIMES = ("p50_ms", "p99_ms")
_EXERCISES = (
    _throughput(
        Row(name="items", title="items/s, 64 streams × 128 items", metric="items_per_s", unit="1/s", beside=_TIMES),
        items=128,
        concurrency=64,
    ),
    _throughput(
        Row(name="requests", title="requests/s, 1 item, 64 in flight", metric="requests_per_s", unit="1/s", beside=_TIMES),
        items=1,
        concurrency=64,
    ),
    _throughput(
        Row(name="latency", title="latency p50, 1 item, 1 in flight", metric="p50_ms", unit="ms", digits=3, beside=("p99_ms",)),
        items=1,
        concurrency=1,
        rounds=4,
    ),
    _Exercise(
        row=Row(
            name="cpu",
            title="CPU per token, both sides, 256 streams paced 50 tokens/s",
            metric="us_per_token",
            unit="µs",
            digits=1,
            beside=("worker_us", "client_us", "tokens_per_s", "p99_ms"),
        ),
        order={"measure": "paced", "items": 100, "streams": 256},
        quick={"measure": "paced", "items": 20, "streams": 256},
    ),
)

_PEERS = tuple(reference.name for reference in REFERENCES)


def _target(row: str, plane: str, sense: Literal["at least", "at most"], limit: float, wording: str, **rest: Any) -> Target:
    return Target(
        row=row, contender=f"stator-{plane}", sense=sense, limit=limit, wording=wording, **({"against": _PEERS} | rest)
    )


_TARGETS = (
    _target("items", "native", "at least", 16, "≥ 16×"),
    _target("items", "compatible", "at least", 8, "≥ 8×"),
    _target("requests", "native", "at least", 12, "≥ 12×"),
    _target("requests", "compatible", "at least", 2, "≥ 2×"),
    _target("latency", "native", "at most", 1 / 4, "≤ 1/4"),
    _target("latency", "native", "at most", 2.5, "≤ 2.5× the floor", against=(FLOOR.name,)),
    _target("latency", "compatible", "at most", 1 / 2.5, "≤ 1/2.5"),
    _target("cpu", "native", "at most", 1 / 5, "≤ 1/5"),
    _target("cpu", "compatible", "at most", 1 / 1.4, "≤ 1/1.4"),
)

_METHOD = (
    "Two processes each, a worker and a client, on loopback; the same Python handler and the same Python client loop for all, "
    "uvloop, items of ~35 bytes.",
    "Every repeat starts fresh processes of every contender; inside it, each row is measured for one contender after the "
    "other, and the first one changes from repeat to repeat.",
    "Every item of every answer is compared with what the handler sends; one wrong answer voids the contender.",
    "Ratios are medians of the ratios inside one repeat, to the better of the two references in that row.",
    "Latency is measured in four short rounds per repeat: where the scheduler puts the two processes changes it a lot.",
    "Processes of one host speak the native plane over a Unix socket unless told not to; a column of its own has it over TCP.",
    "The floor exchanges the same bytes over one TCP connection, made in advance, without encoding, decoding or scheduling.",
    "A paced step wakes all streams at once every 20 ms; CPU is the process time of both processes, all threads.",
    'All runtimes log at `info` to a file, which is a line per request or two, and serve health and metrics; the columns "logs off" '
    "log at `error`.",
)


def answer(plan: Plan) -> Report:
    """Measure all chosen contenders."""
    contenders = choose(RUNTIMES, plan.contenders)
    samples, unavailable = Samples(), dict[str, str]()
    for repeat in range(plan.repeats):
        with (
            tempfile.TemporaryDirectory(prefix="stator-bench-") as directory,
            sessions(contenders, Path(directory), unavailable) as running,
        ):
            _measure_repeat(repeat, running, plan, samples, unavailable)
    names = {contender.name for contender in contenders}
    return Report(
        name="runtime_planes",
        question=(__doc__ or "").strip(),
        method=_METHOD,
        rows=[exercise.row for exercise in _EXERCISES],
        contenders=[(contender.name, contender.label) for contender in contenders],
        samples=samples,
        targets=[target for target in _TARGETS if target.contender in names],
        unavailable=unavailable,
    )


def _measure_repeat(repeat: int, running: list[Session], plan: Plan, samples: Samples, unavailable: dict[str, str]) -> None:
    for exercise in _EXERCISES:
        for round_ in range(exercise.rounds):
            number = repeat * exercise.rounds + round_
            for session in rotated(running, number):
                if session.contender.name not in unavailable:
                    _measure(exercise, number, session, plan, samples, unavailable)


def _measure(
    exercise: _Exercise, number: int, session: Session, plan: Plan, samples: Samples, unavailable: dict[str, str]
) -> None:
    name = session.contender.name
    try:
        metrics = session.measure(exercise.quick if plan.quick else exercise.order, within=_LIMIT)
    except ChildFailed as failure:
        unavailable[name] = f"{exercise.row.name}: {failure}"
        samples.void(name)
    else:
        samples.add(exercise.row.name, name, number, metrics)


def rotated(running: list[Session], by: int) -> list[Session]:
    """The same sessions, beginning with another one in each repeat."""
    start = by % len(running) if running else 0
    return running[start:] + running[:start]
