"""What does an open stream that says nothing cost: resident memory of worker and client for 10 000 of them."""

import tempfile
from pathlib import Path

from benchmarks.children import ChildFailed
from benchmarks.contenders import FLOOR, NATIVE_TCP, QUIET, RUNTIMES, Contender, choose, start
from benchmarks.report import Plan, Report, Row, Samples, Target

__all__ = ["answer"]

_STREAMS, _QUICK_STREAMS = 10_000, 1_000
_LIMIT = 120.0
_MOST_REPEATS = 3
"""Memory varies little from run to run, and opening the streams takes the slower contenders long."""

_ROWS = (
    Row(name="worker", title="worker", metric="worker_kb", unit="KB per stream", digits=1),
    Row(name="client", title="client", metric="client_kb", unit="KB per stream", digits=1, beside=("opened_per_s",)),
)
_METHOD = (
    "Two processes each on loopback. The client opens the streams in batches of 100, one task reading each; every stream "
    "brings one item and then nothing.",
    "Resident memory of each process is read after a warm-up of 100 streams and again when the handler of every stream runs, "
    "each time after a garbage collection; no allocation tracing is on. Memory of the kernel (sockets) is not in it.",
    "Then all streams are released; each must bring its second item, and the worker must have no handler left.",
    "KB are 1000 bytes. What the client's task and list of items cost is included.",
    f"At most {_MOST_REPEATS} repeats, fresh processes in each, one contender alive at a time.",
)


def answer(plan: Plan) -> Report:
    """Measure all chosen contenders."""
    contenders = [contender for contender in choose(RUNTIMES, plan.contenders) if contender not in (FLOOR, NATIVE_TCP, *QUIET)]
    samples, unavailable = Samples(), dict[str, str]()
    for repeat in range(min(plan.repeats, _MOST_REPEATS)):
        for contender in contenders:
            if contender.name not in unavailable:
                _measure(contender, repeat, plan, samples, unavailable)
    return Report(
        name="idle_streams",
        question=(__doc__ or "").strip(),
        method=_METHOD,
        rows=_ROWS,
        contenders=[(contender.name, contender.label) for contender in contenders],
        samples=samples,
        targets=[
            Target(row=row.name, contender=contender.name, sense="at most", limit=10.0, wording="≤ 10 KB")
            for contender in contenders
            if contender.name.startswith("stator-")
            for row in _ROWS
        ],
        unavailable=unavailable,
    )


def _measure(contender: Contender, repeat: int, plan: Plan, samples: Samples, unavailable: dict[str, str]) -> None:
    streams = _QUICK_STREAMS if plan.quick else _STREAMS
    with tempfile.TemporaryDirectory(prefix="stator-bench-") as directory:
        try:
            with start(contender, Path(directory)) as session:
                metrics = session.measure({"measure": "idle", "streams": streams}, within=_LIMIT)
        except ChildFailed as failure:
            unavailable[contender.name] = str(failure)
            samples.void(contender.name)
            return
    for row in _ROWS:
        samples.add(row.name, contender.name, repeat, metrics)
