"""What becomes of a service under too much load: four simulated workers at 0.8, 2 and 5 times what they can do."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.children import Child, ChildFailed, child_environment, free_port
from benchmarks.contenders import STATOR_ENVIRONMENT
from benchmarks.http_serving import wait_until_listed
from benchmarks.report import Plan, Report, Row, Samples, Target

__all__ = ["answer"]

_WORKERS = 4
_SLOTS = 16
_MODEL = "mocker"
_LEVELS = (("load-0.8", "0.8 × capacity", 0.8), ("load-2", "2 × capacity", 2.0), ("load-5", "5 × capacity", 5.0))
_SECONDS, _QUICK_SECONDS = 60.0, 3.0
_WARM_UP, _QUICK_WARM_UP = 3.0, 1.0
_PROBE_RATE = 50.0 * _WORKERS
"""requests a second, far more than they can do: what comes out is the capacity"""

_ROWS = (
    Row(
        name="ttft",
        title="TTFT p99 of requests that were taken",
        metric="ttft_p99_ms",
        unit="ms",
        digits=0,
        beside=("ttft_p50_ms", "taken", "refused"),
    ),
    Row(name="rate", title="requests answered", metric="done_per_s", unit="1/s", digits=1, beside=("capacity_per_s",)),
    Row(name="refusal", title="refusal p99", metric="refusal_p99_ms", unit="ms", digits=1, beside=("refusal_p50_ms",)),
    Row(name="load", title="load generator, cores", metric="load_core", unit="cores", digits=2),
)

_TARGETS = tuple(
    target
    for name in ("load-2", "load-5")
    for target in (
        Target(row="ttft", contender=name, sense="at most", limit=2.0, against=("load-0.8",), wording="≤ 2× that at 0.8"),
        Target(row="refusal", contender=name, sense="at most", limit=10.0, wording="≤ 10 ms"),
        Target(row="load", contender=name, sense="at most", limit=0.5, wording="≤ 0.5 cores"),
    )
)

_METHOD = (
    f"`stator serve`'s parts as processes of their own: a frontend and {_WORKERS} workers with the simulated engine, "
    f"{_SLOTS} requests at once each, otherwise as they are by default; real time, loopback, file discovery.",
    "Prompts of 256 to 768 and answers of 32 to 96 tokens, at random; requests come at random moments (Poisson), whether or not others "
    "have ended. All come from one tenant.",
    "Capacity is what comes out while far more requests come than can be answered, measured first.",
    "TTFT runs from the moment the request should have been sent to the first text. Refusals are answers with 503.",
    f"Each level is measured once, for {_SECONDS:g} s after {_WARM_UP:g} s of the same load, whatever `--repeats` says.",
)


def answer(plan: Plan) -> Report:
    """Measure all chosen levels."""
    chosen = [level for level in _LEVELS if not plan.contenders or level[0] in plan.contenders]
    samples, unavailable = Samples(), dict[str, str]()
    try:
        with tempfile.TemporaryDirectory(prefix="stator-bench-") as directory, _serve(Path(directory)) as port:
            capacity = _load(Path(directory), port, _PROBE_RATE, plan, seed=1, probe=True)["done_per_s"]
            for seed, (name, _, times) in enumerate(chosen, start=2):
                metrics = _load(Path(directory), port, times * capacity, plan, seed=seed) | {"capacity_per_s": capacity}
                for row in _ROWS:
                    if row.metric in metrics:
                        samples.add(row.name, name, 0, metrics)
    except ChildFailed as failure:
        unavailable.update({name: str(failure) for name, _, _ in chosen})
    names = {name for name, _, _ in chosen}
    return Report(
        name="overload",
        question=(__doc__ or "").strip(),
        method=_METHOD,
        rows=_ROWS,
        contenders=[(name, label) for name, label, _ in chosen],
        samples=samples,
        targets=[target for target in _TARGETS if target.contender in names],
        unavailable=unavailable,
    )


@contextmanager
def _serve(directory: Path) -> Iterator[int]:
    """A frontend with workers behind it; its port."""
    environment = child_environment({key: text.format(directory=directory) for key, text in STATOR_ENVIRONMENT.items()})
    port = free_port()
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> Child:
            command = [sys.executable, "-m", "stator", *arguments]
            return stack.enter_context(Child(name, command, environment=environment, directory=directory))

        children = [start("frontend", "frontend", "--host", "127.0.0.1", "--port", str(port))]
        for number in range(_WORKERS):
            options = ("--engine", "mocker", "--option", f"max_num_seqs={_SLOTS}", "--option", f"seed={number}")
            children.append(start(f"worker-{number}", "worker", *options))
        wait_until_listed(port, tuple(children), _MODEL, instances=_WORKERS)
        yield port


def _load(directory: Path, port: int, rate: float, plan: Plan, *, seed: int, probe: bool = False) -> dict[str, float]:
    quick = plan.quick or probe
    seconds = _QUICK_SECONDS * (4 if probe and not plan.quick else 1) if quick else _SECONDS
    warm_up = _QUICK_WARM_UP if quick else _WARM_UP
    command = [sys.executable, "-m", "benchmarks.open_load", "--port", str(port), "--model", _MODEL, "--rate", str(rate)]
    command += ["--seconds", str(seconds), "--warmup", str(warm_up), "--seed", str(seed)]
    with Child("load", command, environment=child_environment({}), directory=directory) as load:
        metrics = load.read(within=seconds + warm_up + 60.0)
    if "error" in metrics:
        raise ChildFailed(f"load: {metrics['error']}")
    return metrics
