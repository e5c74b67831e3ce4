"""A report as Markdown for people and as JSON for programs."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from benchmarks.report import Report, Row, Verdict

__all__ = ["Circumstances", "to_json", "to_markdown"]


class Circumstances(msgspec.Struct, frozen=True, kw_only=True):
    """When, how and on what the report was made."""

    date: str
    command: str
    repeats: int
    seconds: float
    hardware: Mapping[str, str]
    versions: Mapping[str, str]


def to_markdown(report: Report, circumstances: Circumstances) -> str:
    """Title, main table, targets, second table, method and circumstances."""
    parts = [f"# {report.name}", report.question, _medians(report)]
    if report.targets:
        parts += ["## Targets", _targets(report)]
    if any(row.beside for row in report.rows):
        parts += ["## Beside it", _beside(report)]
    if report.unavailable:
        labels = dict(report.contenders)
        parts += ["## Not available", "\n".join(f"- {labels.get(k, k)}: {why}" for k, why in report.unavailable.items())]
    parts += ["## Method", "\n".join(f"- {line}" for line in report.method), _circumstances(circumstances)]
    return "\n\n".join(parts) + "\n"


def to_json(report: Report, circumstances: Circumstances) -> bytes:
    """Everything that was measured, every repeat of it."""
    labels = dict(report.contenders)
    rows = [
        {
            **msgspec.to_builtins(row),
            "contenders": {
                name: {
                    "median": report.samples.median(row.name, name, row.metric),
                    "samples": report.samples.of(row.name, name),
                }
                for name in labels
            },
        }
        for row in report.rows
    ]
    verdicts = [
        {**msgspec.to_builtins(verdict.target), "peer": verdict.peer, "value": verdict.value, "met": verdict.met}
        for verdict in report.verdicts()
    ]
    document = {
        "name": report.name,
        "question": report.question,
        "method": list(report.method),
        **msgspec.to_builtins(circumstances),
        "labels": labels,
        "rows": rows,
        "targets": verdicts,
        "unavailable": report.unavailable,
    }
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def _medians(report: Report) -> str:
    header = ["median (lowest – highest)", *(label for _, label in report.contenders)]
    lines = [
        [f"{row.title}, {row.unit}", *(_spread(report, row, name) for name, _ in report.contenders)] for row in report.rows
    ]
    return _table(header, lines)


def _spread(report: Report, row: Row, contender: str) -> str:
    values = [metrics[row.metric] for metrics in report.samples.of(row.name, contender)]
    if not values:
        return "–"
    middle = f"**{_number(statistics.median(values), row.digits)}**"
    if len(values) == 1:
        return middle
    return f"{middle} ({_number(min(values), row.digits)} – {_number(max(values), row.digits)})"


def _targets(report: Report) -> str:
    labels, titles = dict(report.contenders), {row.name: row for row in report.rows}
    lines = [
        [
            titles[verdict.target.row].title,
            labels.get(verdict.target.contender, verdict.target.contender),
            _measured(verdict, titles[verdict.target.row]),
            labels.get(verdict.peer or "", "–"),
            verdict.target.wording,
            _word(verdict),
        ]
        for verdict in report.verdicts()
    ]
    return _table(["", "who", "measured", "compared with", "target", ""], lines)


def _measured(verdict: Verdict, row: Row) -> str:
    if verdict.value is None:
        return "–"
    if not verdict.target.against:
        return f"{_number(verdict.value, row.digits)} {row.unit}"
    return f"{verdict.value:.1f}×" if verdict.value >= 1 else f"{verdict.value:.3f} (1/{1 / verdict.value:.1f})"


def _word(verdict: Verdict) -> str:
    if verdict.value is None:
        return "not measured"
    return "pass" if verdict.met else "**FAIL**"


def _beside(report: Report) -> str:
    header = ["median", *(label for _, label in report.contenders)]
    lines = [
        [f"{row.title}: {metric.replace('_', ' ')}", *(_median(report, row, name, metric) for name, _ in report.contenders)]
        for row in report.rows
        for metric in row.beside
    ]
    return _table(header, lines)


def _median(report: Report, row: Row, contender: str, metric: str) -> str:
    value = report.samples.median(row.name, contender, metric)
    return "–" if value is None else _number(value, 0 if value >= 1000 else 2)


def _circumstances(made: Circumstances) -> str:
    run = f"Command: `{made.command}` · {made.repeats} repeats · {made.seconds:.0f} s · {made.date}"
    return "\n\n".join((run, f"Hardware: {_pairs(made.hardware)}", f"Versions: {_pairs(made.versions)}"))


def _pairs(values: Mapping[str, str]) -> str:
    return " · ".join(f"{key} {value}" for key, value in values.items())


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}".replace(",", " ")


def _table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows)
