"""Does time stay in proportion to size: how much longer does a request or an item of 30 MB take than one of 10 MB?"""

from benchmarks.alone import MOST_REPEATS, report_alone
from benchmarks.contenders import REFERENCES, RUNTIMES, Session, choose, stator
from benchmarks.report import Plan, Report, Row

__all__ = ["answer"]

_ROUNDS, _QUICK_ROUNDS = 20, 2
_LIMIT = 240.0
_KEEPING = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**30)}
"""The C library keeps freed blocks of any size for the next use."""
_WAYS = {"there": "request", "back": "item"}

_ROWS = tuple(
    Row(name=way, title=title, metric="growth", unit="times as long", digits=2, beside=("ten_ms", "thirty_ms"))
    for way, title in _WAYS.items()
)
_CONTENDERS = (
    *REFERENCES,
    *(contender for contender in RUNTIMES if contender.name in ("stator-native", "stator-compatible")),
    stator("stator-native-keeping", "Stator native, memory kept", STATOR_PLANE="native", **_KEEPING),
    stator("stator-compatible-keeping", "Stator compatible, memory kept", STATOR_PLANE="compatible", **_KEEPING),
)
_METHOD = (
    "Two processes each on loopback. One exchange at a time: a text of 10 MB, then one of 30 MB, and so on.",
    f"The figure is the median of {_ROUNDS} exchanges with 30 MB divided by the median of {_ROUNDS} with 10 MB; the median over "
    "the repeats is shown. Three would be exactly in proportion; with the square of the size it would be nine.",
    "What is above three is mostly memory: the C library gives freed blocks of this size back to the kernel, and each page of a "
    "block that is new costs a fault. In the columns *memory kept* worker and client run with MALLOC_MMAP_MAX_=0 and "
    "MALLOC_TRIM_THRESHOLD_=1073741824, and keep them.",
    f"At most {MOST_REPEATS} repeats, fresh processes in each, one contender alive at a time.",
)


def answer(plan: Plan) -> Report:
    """Measure all chosen contenders."""
    contenders = choose(_CONTENDERS, plan.contenders)
    rounds = _QUICK_ROUNDS if plan.quick else _ROUNDS

    def measure(session: Session) -> dict[str, dict[str, float]]:
        return {way: session.measure({"measure": "large", "way": way, "rounds": rounds}, within=_LIMIT) for way in _WAYS}

    return report_alone(
        "large_messages",
        __doc__ or "",
        _METHOD,
        _ROWS,
        contenders=contenders,
        plan=plan,
        measure=measure,
        limit=4.0,
        wording="30 MB ≤ 4 × 10 MB",
    )
