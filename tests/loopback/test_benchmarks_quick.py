"""The benchmarks run, compare what they receive with what was sent, and say so when something is missing or wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks import token_path
from benchmarks.children import ROOT, Child, ChildFailed, child_environment
from benchmarks.contenders import FLOOR, RUNTIMES, Contender, sessions
from benchmarks.machine import hardware, versions
from benchmarks.measures import WrongAnswer, measure_idle, measure_paced, measure_throughput
from benchmarks.report import Plan, Report, Row, Samples, Target
from benchmarks.sse_load import check_answer
from benchmarks.tables import Circumstances, to_json, to_markdown

PROTOTYPE = next(contender for contender in RUNTIMES if contender.name == "prototype")
OURS = ("stator-native", "stator-native-tcp", "stator-compatible")


def run_benchmarks(output: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(output), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)


def contender_options(*names: str) -> list[str]:
    return [word for name in names for word in ("--contender", name)]


def assert_measured(document: dict[str, Any], names: tuple[str, ...]) -> None:
    assert document["unavailable"] == {}
    for row in document["rows"]:
        assert row["contenders"].keys() == set(names)
        for name in names:
            assert row["contenders"][name]["median"] > 0, (row["name"], name)


@pytest.mark.load
@pytest.mark.timeout(100)
def test_the_planes_are_measured_and_written_down(tmp_path: Path) -> None:
    names = ("floor", "prototype", *OURS)
    run = run_benchmarks(tmp_path, "--only", "runtime_planes", *contender_options(*names))
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads((tmp_path / "runtime_planes.json").read_bytes())
    assert [row["name"] for row in document["rows"]] == ["items", "requests", "latency", "cpu"]
    assert_measured(document, names)
    text = (tmp_path / "runtime_planes.md").read_text()
    assert "items/s, 64 streams × 128 items" in text
    for place in (str(ROOT), str(tmp_path)):
        assert place not in text + json.dumps(document)


@pytest.mark.load
@pytest.mark.timeout(100)
def test_what_tls_costs_is_measured_and_what_nats_carries(tmp_path: Path) -> None:
    names = (
        "stator-native-tcp",
        "stator-native-tls",
        "stator-compatible",
        "stator-compatible-tls",
        "stator-nats",
        "stator-http2",
    )
    run = run_benchmarks(tmp_path, "--only", "planes", *contender_options(*names))
    assert run.returncode == 0, run.stdout + run.stderr
    document = json.loads((tmp_path / "planes.json").read_bytes())
    assert document["unavailable"] == {}
    rows = {row["name"]: row["contenders"] for row in document["rows"]}
    for row in ("items", "requests", "latency"):
        assert all(rows[row][name]["median"] > 0 for name in names), row
        measured = {name for name in names if rows[f"tls_{row}"][name]["median"] is not None}
        assert measured == {"stator-native-tls", "stator-compatible-tls"}
        ratio = rows[row]["stator-compatible-tls"]["median"] / rows[row]["stator-compatible"]["median"]
        if row != "latency":  # which has several rounds
            assert rows[f"tls_{row}"]["stator-compatible-tls"]["median"] == pytest.approx(ratio)


@pytest.mark.load
@pytest.mark.timeout(100)
def test_idle_streams_are_measured(tmp_path: Path) -> None:
    names = ("prototype", *(name for name in OURS if name != "stator-native-tcp"))
    run = run_benchmarks(tmp_path, "--only", "idle_streams", *contender_options(*names))
    assert run.returncode == 0, run.stdout + run.stderr
    assert_measured(json.loads((tmp_path / "idle_streams.json").read_bytes()), names)


@pytest.mark.load
@pytest.mark.timeout(100)
def test_large_messages_are_measured(tmp_path: Path) -> None:
    names = ("stator-native", "stator-compatible")
    run = run_benchmarks(tmp_path, "--only", "large_messages", *contender_options(*names))
    assert run.returncode == 0, run.stdout + run.stderr
    assert_measured(json.loads((tmp_path / "large_messages.json").read_bytes()), names)


@pytest.mark.load
@pytest.mark.timeout(100)
def test_http_serving_is_measured(tmp_path: Path) -> None:
    run = run_benchmarks(tmp_path, "--only", "http_serving", *contender_options("stator"))
    assert run.returncode == 0, run.stdout + run.stderr
    assert_measured(json.loads((tmp_path / "http_serving.json").read_bytes()), ("stator",))


@pytest.mark.load
@pytest.mark.timeout(100)
def test_overload_is_measured(tmp_path: Path) -> None:
    run = run_benchmarks(tmp_path, "--only", "overload", *contender_options("load-0.8", "load-2"))
    assert run.returncode == 0, run.stdout + run.stderr
    rows = {row["name"]: row["contenders"] for row in json.loads((tmp_path / "overload.json").read_bytes())["rows"]}
    assert rows["rate"]["load-2"]["median"] > 0.7 * rows["rate"]["load-0.8"]["median"] > 0
    assert rows["refusal"]["load-2"]["median"] > 0


@pytest.mark.load
@pytest.mark.timeout(60)
def test_every_step_of_the_token_path_gives_the_right_result() -> None:
    report = token_path.answer(Plan(repeats=1, quick=True))
    assert report.unavailable == {}
    assert {"native_stream", "compatible_in", "sse_events"} <= {row.name for row in report.rows}


def test_a_contender_that_cannot_start_is_reported_and_the_others_run(tmp_path: Path) -> None:
    missing = Contender(name="missing", label="", package="reference", python=ROOT / "no-such-environment" / "python")
    broken = Contender(name="broken", label="", package="prototypes", prefix="no_such_")
    unavailable = dict[str, str]()
    with sessions([missing, broken, FLOOR], tmp_path, unavailable) as running:
        assert [session.contender.name for session in running] == ["floor"]
    assert unavailable["missing"] == "no-such-environment/python is missing; `make bench` installs it"
    assert "No module named" in unavailable["broken"]


def test_a_client_that_cannot_carry_out_an_order_says_why(tmp_path: Path) -> None:
    with sessions([PROTOTYPE], tmp_path, {}) as (session,), pytest.raises(ChildFailed, match="client: KeyError: 'no such'"):
        session.measure({"measure": "no such"}, within=10)


async def lie(answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return answer


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ([], "0 items instead of 2"),
        ([{"token_ids": [0], "text": "tok"}], "1 items instead of 2"),
        ([{"token_ids": [0], "text": "tok"}, {"token_ids": [0], "text": "tok"}], "item 1 is"),
        ([{"token_ids": [0], "text": "tok"}, {"token_ids": [1]}], "item 1 is"),
    ],
)
async def test_a_wrong_answer_is_not_counted(answer: list[dict[str, Any]], reason: str) -> None:
    with pytest.raises(WrongAnswer, match=reason):
        await measure_throughput(lambda body: lie(answer), items=2, concurrency=2, seconds=0.01, warmup=0.01)
    with pytest.raises(WrongAnswer, match=reason):
        await measure_paced(lambda body: lie(answer if body["mode"] == "paced" else [{"cpu": 1.0}]), items=20, streams=1)


async def test_idle_streams_that_end_are_noticed() -> None:
    census = [{"idle": 0, "cpu": 0.0, "resident": 1}]
    with pytest.raises(WrongAnswer, match="idle ended"):
        await measure_idle(lambda body: lie(census if body["mode"] == "census" else []), streams=1)


def http_answer(*texts: str, reason: str = "length", done: bool = True) -> bytes:
    choices = [{"index": 0, "delta": {"content": text}, "finish_reason": None} for text in texts]
    choices[-1]["finish_reason"] = reason
    events = [f"data: {json.dumps({'choices': [choice]})}\n\n".encode() for choice in choices] + [b"data: [DONE]\n\n"] * done
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


def test_http_answers_are_compared_with_the_expected_text() -> None:
    assert check_answer(http_answer("he", "llo", ""), "hello") == 2
    for wrong in (http_answer("he", "lo"), http_answer("hello", reason="stop"), http_answer("hello", done=False)):
        with pytest.raises(WrongAnswer):
            check_answer(wrong, "hello")
    with pytest.raises(WrongAnswer, match="503"):
        check_answer(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", "hello")


def test_ending_a_child_ends_its_whole_group(tmp_path: Path) -> None:
    script = (
        "import json, signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], stdout=subprocess.DEVNULL)\n"
        "print(json.dumps({'pid': child.pid}), flush=True); sys.exit(0)\n"
    )
    with Child("parent", [sys.executable, "-c", script], environment=child_environment({}), directory=tmp_path) as child:
        grandchild = child.read(within=20)["pid"]
        assert is_running(grandchild)
        with pytest.raises(ChildFailed, match="parent ended with code 0"):
            child.read(within=20)
    until = time.monotonic() + 5
    while is_running(grandchild) and time.monotonic() < until:
        time.sleep(0.01)
    assert not is_running(grandchild)


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def report_of(samples: Samples, *targets: Target) -> Report:
    return Report(
        name="example",
        question="Which?",
        method=("as written",),
        rows=[Row(name="rate", title="rate", metric="rate", unit="1/s")],
        contenders=[("old", "Old"), ("new", "New"), ("ours", "Ours")],
        samples=samples,
        targets=targets,
        unavailable={},
    )


def test_ratios_are_taken_inside_a_repeat_against_the_better_peer() -> None:
    samples = Samples()
    for repeat, (old, new, ours) in enumerate([(10, 20, 200), (5, 10, 100), (50, 100, 500)]):
        for name, rate in (("old", old), ("new", new), ("ours", ours)):
            samples.add("rate", name, repeat, {"rate": float(rate)})
    target = Target(row="rate", contender="ours", sense="at least", limit=10, against=("old", "new"), wording="≥ 10×")
    absolute = Target(row="rate", contender="ours", sense="at most", limit=100, wording="≤ 100")
    verdicts = report_of(samples, target, absolute).verdicts()
    assert [(verdict.peer, verdict.value, verdict.met) for verdict in verdicts] == [("new", 10.0, True), (None, 200.0, False)]
    samples.void("ours")
    assert [verdict.met for verdict in report_of(samples, target, absolute).verdicts()] == [False, False]


def test_the_tables_say_what_was_measured_where() -> None:
    samples = Samples()
    for name, rate in (("old", 1234.4), ("ours", 500.0)):
        samples.add("rate", name, 0, {"rate": rate})
    target = Target(row="rate", contender="ours", sense="at least", limit=10, against=("old",), wording="≥ 10×")
    report = report_of(samples, target)
    circumstances = Circumstances(
        date="2026-01-01", command="python -m benchmarks", repeats=1, seconds=2.0, hardware=hardware(), versions=versions()
    )
    text = to_markdown(report, circumstances)
    assert "| rate, 1/s | **1 234** | – | **500** |" in text
    assert "**FAIL**" in text
    assert {"python", "stator", "uvloop", "msgspec", "reference"} <= circumstances.versions.keys()
    document = json.loads(to_json(report, circumstances))
    assert document["rows"][0]["contenders"]["old"]["samples"] == [{"rate": 1234.4}]
    assert document["targets"][0]["met"] is False
