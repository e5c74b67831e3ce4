"""What does an OpenAI client get: tokens per second, CPU per token and time to first token, through frontend and worker."""

import http.client
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from benchmarks.children import ROOT, Child, ChildFailed, child_environment, free_port
from benchmarks.contenders import REFERENCE_ENVIRONMENT, STATOR_ENVIRONMENT
from benchmarks.model_directory import MODEL_NAME, expected_text, write_model
from benchmarks.report import Plan, Report, Row, Samples, Target
from benchmarks.steps import STEP

__all__ = ["answer", "wait_until_listed"]

_START_LIMIT = 60.0
_LOAD_LIMIT = 120.0
_TOKENS, _QUICK_TOKENS = 128, 32


class _Deployment(msgspec.Struct, frozen=True, kw_only=True):
    """A frontend and one worker. In arguments and environment `{port}`, `{model}`, `{step}` and `{directory}` are filled in."""

    name: str
    label: str
    python: Path = Path(sys.executable)
    frontend: tuple[str, ...]
    worker: tuple[str, ...]
    environment: Mapping[str, str]


_DEPLOYMENTS = (
    _Deployment(
        name="reference-1.3.1",
        label="reference 1.3.1",
        python=ROOT / ".venv-reference" / "bin" / "python",
        frontend=("-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", "{port}", "--router-mode", "round-robin"),
        worker=("-m", "benchmarks.reference.model_worker", "{model}", "{step}"),
        environment=REFERENCE_ENVIRONMENT | {"HOME": "{directory}", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
    ),
    _Deployment(
        name="stator",
        label="Stator",
        frontend=("-m", "stator", "frontend", "--host", "127.0.0.1", "--port", "{port}"),
        worker=("-m", "benchmarks.ours.model_worker", "{model}", "{step}"),
        environment=STATOR_ENVIRONMENT,
    ),
)


class _Serving(msgspec.Struct, frozen=True, kw_only=True):
    """A running deployment."""

    port: int
    frontend: Child
    worker: Child


class _Exercise(msgspec.Struct, frozen=True, kw_only=True):
    """One load and the rows it fills. `step` is the worker's pace in seconds, 0 for none."""

    rows: tuple[Row, ...]
    step: float
    load: tuple[str, ...]
    quick: tuple[str, ...]


_EXERCISES = (
    _Exercise(
        rows=(
            Row(
                name="rate",
                title="SSE tokens/s, 64 streams, worker without delay",
                metric="tokens_per_s",
                unit="1/s",
                beside=(
                    "ttft_p50_ms",
                    "ttft_p99_ms",
                    "frontend_us",
                    "worker_us",
                    "load_us",
                    "events_per_answer",
                    "reads_per_answer",
                ),
            ),
        ),
        step=0.0,
        load=("--concurrency", "64", "--seconds", "3"),
        quick=("--concurrency", "64", "--seconds", "0.3"),
    ),
    _Exercise(
        rows=(
            Row(
                name="ttft",
                title="TTFT p50, 1 stream, kept-alive",
                metric="ttft_p50_ms",
                unit="ms",
                digits=2,
                beside=("ttft_p99_ms", "answer_p50_ms"),
            ),
        ),
        step=0.0,
        load=("--concurrency", "1", "--requests", "50"),
        quick=("--concurrency", "1", "--requests", "10"),
    ),
    _Exercise(
        rows=(
            Row(
                name="cpu",
                title="CPU per token, frontend + worker, 256 streams paced 50 tokens/s",
                metric="us_per_token",
                unit="µs",
                digits=1,
                beside=("frontend_us", "worker_us", "load_us", "tokens_per_s", "events_per_answer"),
            ),
            Row(
                name="ttft_paced",
                title="TTFT p50, 256 streams paced 50 tokens/s",
                metric="ttft_p50_ms",
                unit="ms",
                digits=1,
                beside=("ttft_p99_ms", "answer_p99_ms"),
            ),
        ),
        step=STEP,
        load=("--concurrency", "256", "--requests", "512"),
        quick=("--concurrency", "256", "--requests", "256"),
    ),
)

_PEER = ("reference-1.3.1",)
_TARGETS = (
    Target(row="rate", contender="stator", sense="at least", limit=8, against=_PEER, wording="≥ 8×"),
    Target(row="cpu", contender="stator", sense="at most", limit=1 / 3, against=_PEER, wording="≤ 1/3"),
    Target(row="ttft", contender="stator", sense="at most", limit=1 / 5, against=_PEER, wording="≤ 1/5"),
    Target(row="ttft_paced", contender="stator", sense="at most", limit=1 / 2, against=_PEER, wording="≤ 1/2"),
)

_METHOD = (
    "A frontend and one worker process with a Python handler, on loopback with file discovery; both contenders have the same "
    f"model directory (byte-level BPE, 4 000 tokens) and send the same tokens, {_TOKENS} per answer.",
    "The load is one process with plain sockets on kept-alive connections, one request in flight on each; `load us` is what "
    "it cost per token.",
    "Every answer is parsed after the clock stopped: exact text, finish reason `length`, `[DONE]`.",
    "A token counts as a token however many share an SSE event or a write: `events per answer` and `reads per answer` show it.",
    "TTFT ends with the first text, not with a delta that has the role alone.",
    "CPU is that of the two process groups, from the kernel's clock of 10 ms.",
    "Every repeat starts fresh processes of one contender after the other for each pace; the first one changes from repeat to "
    "repeat. Ratios are medians of the ratios inside one repeat.",
)


def answer(plan: Plan) -> Report:
    """Measure all chosen contenders."""
    chosen = [deployment for deployment in _DEPLOYMENTS if not plan.contenders or deployment.name in plan.contenders]
    samples, unavailable = Samples(), dict[str, str]()
    with tempfile.TemporaryDirectory(prefix="stator-bench-") as directory:
        model = Path(directory) / "model"
        write_model(model)
        for repeat in range(plan.repeats):
            for step in (0.0, STEP):
                for deployment in chosen[repeat % len(chosen) :] + chosen[: repeat % len(chosen)] if chosen else ():
                    if deployment.name not in unavailable:
                        _measure(deployment, repeat, step, model, plan, samples, unavailable)
    names = {deployment.name for deployment in chosen}
    return Report(
        name="http_serving",
        question=(__doc__ or "").strip(),
        method=_METHOD,
        rows=[row for exercise in _EXERCISES for row in exercise.rows],
        contenders=[(deployment.name, deployment.label) for deployment in chosen],
        samples=samples,
        targets=[target for target in _TARGETS if target.contender in names],
        unavailable=unavailable,
    )


def _measure(
    deployment: _Deployment,
    repeat: int,
    step: float,
    model: Path,
    plan: Plan,
    samples: Samples,
    unavailable: dict[str, str],
) -> None:
    """All exercises of one pace, on a fresh deployment."""
    with tempfile.TemporaryDirectory(prefix="stator-bench-") as directory:
        try:
            with _serve(deployment, Path(directory), model=model, step=step) as serving:
                for exercise in _EXERCISES:
                    if exercise.step == step:
                        metrics = _load(serving, exercise, model, plan, Path(directory))
                        for row in exercise.rows:
                            samples.add(row.name, deployment.name, repeat, metrics)
        except ChildFailed as failure:
            unavailable[deployment.name] = str(failure)
            samples.void(deployment.name)


def _load(serving: _Serving, exercise: _Exercise, model: Path, plan: Plan, directory: Path) -> dict[str, float]:
    tokens = _QUICK_TOKENS if plan.quick else _TOKENS
    command = [sys.executable, "-m", "benchmarks.sse_load", "--port", str(serving.port), "--model", MODEL_NAME]
    command += ["--max-tokens", str(tokens), "--expect", expected_text(model, tokens)]
    command += ["--process", f"frontend={serving.frontend.pid}", "--process", f"worker={serving.worker.pid}"]
    command += exercise.quick if plan.quick else exercise.load
    with Child("load", command, environment=child_environment({}), directory=directory) as load:
        return load.read(within=_LOAD_LIMIT)


@contextmanager
def _serve(deployment: _Deployment, directory: Path, *, model: Path, step: float) -> Iterator[_Serving]:
    """Start frontend and worker and wait until the model is listed. `ChildFailed` with the reason if it never is."""
    if not deployment.python.exists():
        raise ChildFailed(f"{deployment.python.relative_to(ROOT)} is missing; `make bench` installs it")
    port = free_port()
    values = {"port": port, "model": model, "step": step, "directory": directory}
    environment = child_environment({key: text.format(**values) for key, text in deployment.environment.items()})

    def child(name: str, arguments: tuple[str, ...]) -> Child:
        command = [str(deployment.python), *(text.format(**values) for text in arguments)]
        return Child(name, command, environment=environment, directory=directory)

    with ExitStack() as stack:
        frontend = stack.enter_context(child("frontend", deployment.frontend))
        worker = stack.enter_context(child("worker", deployment.worker))
        wait_until_listed(port, (frontend, worker), MODEL_NAME)
        yield _Serving(port=port, frontend=frontend, worker=worker)


def wait_until_listed(port: int, children: tuple[Child, ...], model: str, *, instances: int = 0) -> None:
    """Wait until the frontend lists the model, and so many instances of it. Raises `ChildFailed` when one of the children ends."""
    until = time.monotonic() + _START_LIMIT
    while time.monotonic() < until:
        for child in children:
            child.check_alive()
        try:
            listed = f'"{model}"'.encode() in _get(port, "/v1/models")
            if listed and (not instances or _get(port, "/health").count(b'"instance_id"') >= instances):
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.1)
    raise ChildFailed(f"the frontend did not list the model within {_START_LIMIT:g} s")


def _get(port: int, path: str) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().read()
    finally:
        connection.close()
