"""Each file in `examples/` runs, as a process of its own."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stator.testing.documents import write_blocks
from stator.testing.serve_process import StatorProcess

pytestmark = pytest.mark.timeout(60)

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return {"STATOR_FILE_ROOT": str(tmp_path), "STATOR_HTTP_PORT": "0", "PYTHONUNBUFFERED": "1"}


def example(name: str, environment: dict[str, str], *arguments: str) -> StatorProcess:
    return StatorProcess(*arguments, command=(sys.executable, name), directory=EXAMPLES, environment=environment)


def output_of(name: str, environment: dict[str, str], *arguments: str) -> list[str]:
    with example(name, environment, *arguments) as process:
        status = process.wait(30)
        assert status == 0, process.output
        return process.lines


def test_every_example_is_named_here() -> None:
    here = Path(__file__).read_text("utf-8")
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.name}"' in here or f'"{path.stem}:' in here, path.name


def test_worker_and_client(environment: dict[str, str]) -> None:
    with example("worker.py", environment):
        assert output_of("client.py", environment) == ["hello", "from", "the", "other", "process"]


def test_worker_and_client_with_the_names_of_the_reference(environment: dict[str, str]) -> None:
    with example("dynamo_worker.py", environment):
        assert output_of("dynamo_client.py", environment) == ["hello", "from", "the", "other", "process"]


def test_pipeline(environment: dict[str, str]) -> None:
    assert output_of("pipeline.py", environment) == ["['TWO', 'STAGES', 'TWO', 'STAGES']"]


@pytest.fixture
def service(environment: dict[str, str]) -> Iterator[StatorProcess]:
    arguments = ("serve", "--engine", "engine:Backwards", "--option", "pause=0.001")
    with StatorProcess(*arguments, directory=EXAMPLES, environment=environment) as process:
        process.wait_until_ready()
        yield process


def test_engine_and_openai_client(service: StatorProcess, environment: dict[str, str]) -> None:
    url = f"{service.wait_until_ready()}/v1"
    assert output_of("openai_client.py", environment, url) == ["👋 maerts a morf eßürG"]


def test_the_block_of_the_page_about_the_references_names(tmp_path: Path, environment: dict[str, str]) -> None:
    assert write_blocks(EXAMPLES.parent / "docs" / "dynamo.md", tmp_path) == ["dynamo_names.py"]
    with StatorProcess(command=(sys.executable, "dynamo_names.py"), directory=tmp_path, environment=environment):
        assert output_of("dynamo_client.py", environment) == ["hello", "from", "the", "other", "process"]
