"""What does an open stream that says nothing cost: resident memory of worker and client for 10 000 of them."""

from benchmarks.alone import MOST_REPEATS, report_alone
from benchmarks.contenders import FLOOR, NATIVE_TCP, QUIET, RUNTIMES, Session, choose
from benchmarks.report import Plan, Report, Row

__all__ = ["answer"]

_STREAMS, _QUICK_STREAMS = 10_000, 1_000
_LIMIT = 120.0

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
    f"At most {MOST_REPEATS} repeats, fresh processes in each, one contender alive at a time.",
)


def answer(plan: Plan) -> Report:
    """Measure all chosen contenders."""
    contenders = [contender for contender in choose(RUNTIMES, plan.contenders) if contender not in (FLOOR, NATIVE_TCP, *QUIET)]
    streams = _QUICK_STREAMS if plan.quick else _STREAMS

    def measure(session: Session) -> dict[str, dict[str, float]]:
        metrics = session.measure({"measure": "idle", "streams": streams}, within=_LIMIT)
        return {row.name: metrics for row in _ROWS}

    return report_alone(
        "idle_streams",
        __doc__ or "",
        _METHOD,
        _ROWS,
        contenders=contenders,
        plan=plan,
        measure=measure,
        limit=10.0,
        wording="≤ 10 KB",
    )
