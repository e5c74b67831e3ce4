"""How fast do two processes stream to each other: rates, latency, CPU per token, for every runtime and plane."""

from typing import Any, Literal

from benchmarks.contenders import FLOOR, REFERENCES, RUNTIMES, choose
from benchmarks.exercises import ITEMS, LATENCY, REQUESTS, Exercise, measure
from benchmarks.report import Plan, Report, Row, Target

__all__ = ["answer"]

_EXERCISES = (
    ITEMS,
    REQUESTS,
    LATENCY,
    Exercise(
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
    unavailable = dict[str, str]()
    samples = measure(_EXERCISES, contenders, plan, unavailable)
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
