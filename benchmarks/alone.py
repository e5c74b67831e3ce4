"""Contenders that are measured one at a time, with fresh processes in every repeat: what they are measured by would disturb others."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.children import ChildFailed
from benchmarks.contenders import Contender, Session, start
from benchmarks.report import Plan, Report, Row, Samples, Target

__all__ = ["MOST_REPEATS", "report_alone"]

MOST_REPEATS = 3
"""Repeats take long here, and vary little."""


Measure = Callable[[Session], dict[str, dict[str, float]]]
"""gives metrics by row"""


def report_alone(
    name: str,
    question: str,
    method: Sequence[str],
    rows: Sequence[Row],
    *,
    contenders: Sequence[Contender],
    plan: Plan,
    measure: Measure,
    limit: float,
    wording: str,
) -> Report:
    """Measure all contenders. Each of ours has `limit`, worded so, as its target in each row."""
    samples, unavailable = _measure_alone(contenders, plan, measure)
    return Report(
        name=name,
        question=question.strip(),
        method=method,
        rows=rows,
        contenders=[(contender.name, contender.label) for contender in contenders],
        samples=samples,
        targets=[
            Target(row=row.name, contender=contender.name, sense="at most", limit=limit, wording=wording)
            for contender in contenders
            if contender.name.startswith("stator-")
            for row in rows
        ],
        unavailable=unavailable,
    )


def _measure_alone(contenders: Sequence[Contender], plan: Plan, measure: Measure) -> tuple[Samples, dict[str, str]]:
    """The samples, and the reasons of contenders that have none."""
    samples, unavailable = Samples(), dict[str, str]()
    for repeat in range(min(plan.repeats, MOST_REPEATS)):
        for contender in contenders:
            if contender.name in unavailable:
                continue
            with tempfile.TemporaryDirectory(prefix="stator-bench-") as directory:
                try:
                    with start(contender, Path(directory)) as session:
                        found = measure(session)
                except ChildFailed as failure:
                    unavailable[contender.name] = str(failure)
                    samples.void(contender.name)
                    continue
            for row, metrics in found.items():
                samples.add(row, contender.name, repeat, metrics)
    return samples, unavailable
