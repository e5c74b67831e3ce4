"""The simulated engine against the reference's offline replay: the same traces, and every figure of the reports.

The reference counts time as a float of milliseconds, we in nanoseconds: sums differ in the last digits. Where they differ on purpose:

- A request whose prompt and answer can never fit is rejected here; the reference tries it forever, and its replay never ends.
- When a pass has no budget left, nothing more is admitted here, as in vLLM; the reference still admits a prompt that is wholly cached,
  whose tokens then wait behind the prompt that took the budget.
- `max_num_batched_tokens` below `max_num_seqs` is refused here; in the reference sequences without budget stand still.
"""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy
import pytest

from interop.peers import HERE, REFERENCE, needs_reference
from stator.mocker.options import MockerOptions
from stator.mocker.simulation import round_robin, simulate
from stator.mocker.workload import mooncake_trace

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120), needs_reference]

BLOCK = 64


class Case(msgspec.Struct, kw_only=True):
    """One replay. `args` have the same names on both sides."""

    name: str
    rows: list[dict[str, Any]]
    workers: int = 1
    args: dict[str, Any] = {}


def row(time: float, prompt: int, answer: int, content: list[int] | int, **more: Any) -> dict[str, Any]:
    """A line of a trace; a number stands for that many ids after it times a thousand."""
    count = -(-prompt // BLOCK)
    ids = content if isinstance(content, list) else [content * 1000 + index for index in range(count)]
    return {"timestamp": time, "input_length": prompt, "output_length": answer, "hash_ids": ids[:count], **more}


def named_cases() -> list[Case]:
    two = [row(0, 6000, 4, 1), row(0, 6000, 4, 2)]
    again = [row(0, 1024, 5, 1), row(1000, 1024, 5, 1)]
    scarce = [row(0, 256, 200, number) for number in range(3)]
    return [
        Case(name="one prompt of 1024", rows=[row(0, 1024, 10, 1)]),
        Case(name="seven times as fast", rows=[row(0, 1024, 10, 1)], args={"speedup_ratio": 7.0, "decode_speedup_ratio": 3.0}),
        Case(name="two of 6000 in chunks", rows=two),
        Case(name="two of 6000 without chunks", rows=two, args={"enable_chunked_prefill": False}),
        Case(name="the same again", rows=again),
        Case(name="the same again without a cache", rows=again, args={"enable_prefix_caching": False}),
        Case(name="the same at the same time", rows=[row(0, 1024, 5, 1), row(0, 1024, 5, 1)]),
        Case(name="uneven lengths", rows=[row(0, 1001, 5, 1), row(0, 3000, 9, 2), row(3, 777, 4, 1)]),
        Case(name="20 blocks", rows=scarce, args={"num_gpu_blocks": 20}),
        Case(name="20 blocks, the oldest gives way", rows=scarce, args={"num_gpu_blocks": 20, "preemption_mode": "fifo"}),
        Case(name="20 blocks without a cache", rows=scarce, args={"num_gpu_blocks": 20, "enable_prefix_caching": False}),
        Case(name="two slots", rows=scarce, args={"max_num_seqs": 2}),
        Case(name="a prompt that never fits", rows=[row(0, 2000, 5, 1), row(0, 100, 5, 2)], args={"num_gpu_blocks": 20}),
        Case(
            name="sessions on three workers",
            workers=3,
            rows=[
                row(0, 640, 30, 1, session_id="a"),
                row(0, 320, 20, 2, session_id="b"),
                row(0, 704, 30, 1, session_id="a", delay=250.0),
                row(5, 100, 10, 3),
                row(9, 768, 10, 1, session_id="a", delay=0),
            ],
        ),
    ]


def random_case(seed: int) -> Case:
    """Up to twenty requests in two seconds, of which many share a beginning, on an engine with few blocks and small passes."""
    rng = random.Random(seed)
    rows: list[dict[str, Any]] = []
    for number in range(rng.randint(2, 20)):
        content = [1_000_000 + number * 1000 + index for index in range(20)]
        if rng.random() < 0.5:
            shared = rng.randint(0, 12)
            group = rng.randint(0, 2) * 1000
            content[:shared] = range(group, group + shared)
        rows.append(row(rng.randint(0, 2000), rng.randint(1, 700), rng.randint(1, 150), content))
    chunked = rng.random() < 0.6
    budget = rng.choice([64, 100, 256, 1000, 8192]) if chunked else 1000
    args = {
        "num_gpu_blocks": rng.randint(16, 60),
        "enable_prefix_caching": rng.random() < 0.75,
        "enable_chunked_prefill": chunked,
        "preemption_mode": rng.choice(["lifo", "fifo"]),
        "max_num_batched_tokens": budget,
        "max_num_seqs": min(rng.choice([1, 2, 5, 256]), budget),
        "speedup_ratio": rng.choice([1.0, 1.0, 7.0]),
        "decode_speedup_ratio": rng.choice([1.0, 2.5]),
    }
    rows.sort(key=lambda each: each["timestamp"])
    return Case(name=f"random {seed}", rows=rows, args=args)


def profile_case(directory: Path) -> Case:
    path = directory / "profile.npz"
    context, held = [50.0, 700.0, 10_000.0], [100.0, 3000.0, 100_000.0]
    itl = [[5 + 2e-3 * tokens + 3e-2 * length + 1e-6 * tokens * length for length in context] for tokens in held]
    numpy.savez(
        path,
        prefill_isl=numpy.array([100.0, 1000.0, 5000.0]),
        prefill_ttft_ms=numpy.array([10.0, 70.0, 500.0]),
        decode_active_kv_tokens=numpy.array(held),
        decode_context_length=numpy.array(context),
        decode_itl=numpy.array(itl),
    )
    rows = [row(0, 1000, 20, 1), row(3, 1501, 30, 2), row(200, 6000, 10, 3), row(300, 40, 50, 4)]
    return Case(name="measured times", rows=rows, args={"planner_profile_data": str(path), "speedup_ratio": 3.0})


def replayed(cases: list[Case]) -> list[dict[str, float]]:
    """What the reference reports."""
    done = subprocess.run(
        [str(REFERENCE), str(HERE / "replays.py")],
        input=msgspec.json.encode(cases),
        capture_output=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout.splitlines()[-1])


def simulated(case: Case) -> dict[str, float]:
    """What we report."""
    arguments = dict(case.args)
    if "planner_profile_data" in arguments:
        arguments["planner_profile_data"] = Path(arguments["planner_profile_data"])
    trace = mooncake_trace([json.dumps(each) for each in case.rows], block_size=BLOCK)
    return simulate(trace, options=MockerOptions(**arguments), workers=case.workers, route=round_robin()).report()


NOT_TIMES = {"num_requests"}  # the reference does not count what it rejects


def differences(case: Case, theirs: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Figures that differ by more than rounding: 0.1 µs, or a ten-millionth."""
    ours = simulated(case)
    assert len(ours) > 30
    return {
        name: (value, theirs[name])
        for name, value in ours.items()
        if name not in NOT_TIMES and value != pytest.approx(theirs[name], abs=1e-4, rel=1e-7)
    }


def test_known_traces_take_as_long_as_in_the_reference(tmp_path: Path) -> None:
    cases = [*named_cases(), profile_case(tmp_path)]
    found = {case.name: differences(case, report) for case, report in zip(cases, replayed(cases), strict=True)}
    assert found == {case.name: {} for case in cases}


def test_random_traces_take_as_long_as_in_the_reference() -> None:
    cases = [random_case(seed) for seed in range(120)]
    found = {case.name: differences(case, report) for case, report in zip(cases, replayed(cases), strict=True)}
    assert {name: what for name, what in found.items() if what} == {}
