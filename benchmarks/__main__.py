"""`python -m benchmarks`: ask the questions, print the tables, write them down.

Exit status: 0 if every contender was measured and every answer was right (targets may have been missed: see the tables),
1 if one was not, 2 for a wrong command line.
"""

import argparse
import importlib
import resource
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.machine import hardware, versions
from benchmarks.report import Plan, Report
from benchmarks.tables import Circumstances, to_json, to_markdown

QUESTIONS = ("runtime_planes", "planes", "http_serving", "idle_streams", "large_messages", "token_path", "overload")
RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str]) -> int:
    """Run the chosen questions; the exit status is described above."""
    options = _parser().parse_args(arguments)
    _allow_many_files()
    plan = Plan(
        repeats=options.repeats or (1 if options.quick else 5), quick=options.quick, contenders=tuple(options.contender)
    )
    output: Path | None = options.output or (None if options.quick else RESULTS)
    complete = True
    for name in options.only or QUESTIONS:
        began = time.monotonic()
        report: Report = importlib.import_module(f"benchmarks.{name}").answer(plan)
        circumstances = Circumstances(
            date=datetime.now(UTC).date().isoformat(),
            command=_command(name, plan),
            repeats=plan.repeats,
            seconds=time.monotonic() - began,
            hardware=hardware(),
            versions=versions(),
        )
        _publish(report, circumstances, output)
        complete = complete and not report.unavailable
    return 0 if complete else 1


def _publish(report: Report, circumstances: Circumstances, output: Path | None) -> None:
    text = to_markdown(report, circumstances)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / f"{report.name}.md").write_text(text)
        (output / f"{report.name}.json").write_bytes(to_json(report, circumstances))
    print(text, flush=True)


def _allow_many_files() -> None:
    """Children inherit it: a stream of the compatible plane is a socket, and ten thousand of them are asked for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _command(name: str, plan: Plan) -> str:
    """The command that repeats one question, without paths."""
    words = ["python", "-m", "benchmarks", "--only", name, "--repeats", str(plan.repeats)]
    words += ["--quick"] if plan.quick else []
    for contender in plan.contenders:
        words += ["--contender", contender]
    return shlex.join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure Stator and its peers alternately.")
    parser.add_argument("--only", action="append", choices=QUESTIONS, help="ask only this question; may be given several times")
    parser.add_argument("--repeats", type=_positive, help="how often each contender is measured (default 5, quick 1)")
    parser.add_argument(
        "--quick", action="store_true", help="small counts, to see that everything works; the figures mean little"
    )
    parser.add_argument(
        "--contender", action="append", default=[], metavar="NAME", help="measure only this one; may be given several times"
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where the tables go (default benchmarks/results; quick: nowhere)"
    )
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
