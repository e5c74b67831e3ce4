"""Everything the README and the examples show runs, as processes of its own."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"<!-- run: (\S+) -->\n```python\n(.*?)```", re.DOTALL)
LIMIT = 40.0


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {**os.environ, "STATOR_FILE_ROOT": str(tmp_path / "discovery"), "PYTHONUNBUFFERED": "1"}


@contextmanager
def process(arguments: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    started = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield started
    finally:
        started.terminate()
        try:
            started.wait(20)
        except subprocess.TimeoutExpired:
            started.kill()
            started.wait()
        assert started.stdout is not None
        started.stdout.close()


def output_of(arguments: list[str], environment: dict[str, str]) -> str:
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=LIMIT, check=True
    ).stdout


def test_worker_and_client_of_the_readme(tmp_path: Path, environment: dict[str, str]) -> None:
    blocks = dict(BLOCK.findall((ROOT / "README.md").read_text()))
    for name, source in blocks.items():
        (tmp_path / name).write_text(source)
    with process([str(tmp_path / "worker.py")], environment) as worker:
        assert output_of([str(tmp_path / "client.py")], environment) == "hello\nworld\n"
    assert worker.returncode == 0


def test_the_block_of_the_runtime_page(tmp_path: Path, environment: dict[str, str]) -> None:
    source = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "runtime.md").read_text(), re.DOTALL)
    assert source is not None
    (tmp_path / "runtime.py").write_text(source[1])
    assert output_of([str(tmp_path / "runtime.py")], environment) == "{'echo': {'prompt': 'hi'}}\n"


def test_example_worker_and_client(environment: dict[str, str]) -> None:
    with process([str(ROOT / "examples" / "worker.py")], environment):
        shown = output_of([str(ROOT / "examples" / "client.py")], environment)
    assert shown.split() == ["hello", "from", "the", "other", "process"]


def test_example_pipeline(environment: dict[str, str]) -> None:
    shown = output_of([str(ROOT / "examples" / "pipeline.py")], environment)
    assert shown == "['ONE', 'REQUEST', 'THROUGH', 'TWO', 'STAGES']\n"


def test_example_engine_and_the_openai_client(environment: dict[str, str]) -> None:
    with (
        process([str(ROOT / "examples" / "engine.py")], environment),
        process(["-m", "stator", "frontend", "--port", "0"], environment) as frontend,
    ):
        assert frontend.stdout is not None
        url = next(line.split()[-1] for line in frontend.stdout if "listening on" in line)
        wait_for_model(url, "backwards")
        shown = output_of([str(ROOT / "examples" / "openai_client.py"), f"{url}/v1"], environment)
    assert "maerts a morf" in shown


def wait_for_model(url: str, name: str) -> None:
    import time
    import urllib.request

    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as answer:
            if name in answer.read().decode():
                return
        time.sleep(0.05)
    raise AssertionError(f"model {name} did not appear")
