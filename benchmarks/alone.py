"""Contenders that are measured one at a time, with fresh processes in every repeat: what they are measured by would disturb others."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.children import ChildFailed
from benchmarks.contenders import Contender, Session, start
from benchmarks.report import Plan, Samples

__all__ = ["MOST_REPEATS", "measure_alone"]

MOST_REPEATS = 3
"""Repeats take long here, and vary little."""


def measure_alone(
    contenders: Sequence[Contender], plan: Plan, measure: Callable[[Session], dict[str, dict[str, float]]]
) -> tuple[Samples, dict[str, str]]:
    """`measure` gives metrics by row. The samples, and the reasons of contenders that have none."""
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
