"""Each file in `examples/` runs, as a process of its own."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import pytest

from stator.testing.documents import write_blocks
from stator.testing.engine_suite import run_conformance
from stator.testing.serve_process import StatorProcess
from stator.worker import FunctionEngine

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


@contextmanager
def served(engine: str, environment: dict[str, str], *options: str, directory: Path = EXAMPLES) -> Iterator[str]:
    """The URL of a service with that engine."""
    with StatorProcess("serve", "--engine", engine, *options, directory=directory, environment=environment) as process:
        yield f"{process.wait_until_ready()}/v1"


def test_engine_class_and_openai_client(environment: dict[str, str]) -> None:
    with served("engine_class:Backwards", environment, "--option", "pause=0.001") as url:
        assert output_of("openai_client.py", environment, url) == ["👋 maerts a morf eßürG"]


def test_engine_function_and_openai_client(environment: dict[str, str]) -> None:
    with served("engine_function:shout", environment) as url:
        assert output_of("openai_client.py", environment, url) == ["GRÜSSE FROM A STREAM 👋"]


def test_an_engine_may_be_named_by_a_dotted_path(environment: dict[str, str]) -> None:
    arguments = ("--option", "name=loud")
    with served("examples.engine_function:shout", environment, *arguments, directory=EXAMPLES.parent) as url:
        assert output_of("openai_client.py", environment, url) == ["GRÜSSE FROM A STREAM 👋"]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """They can be imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for name in ("engine_class", "engine_function"):
        sys.modules.pop(name, None)


async def test_the_engines_keep_the_contract(examples: None) -> None:
    class_module, function_module = import_module("engine_class"), import_module("engine_function")
    await run_conformance(lambda: class_module.Backwards(class_module.Options(pause=0.02)))
    await run_conformance(lambda: FunctionEngine(function_module.shout))


def test_the_block_of_the_page_about_the_references_names(tmp_path: Path, environment: dict[str, str]) -> None:
    assert write_blocks(EXAMPLES.parent / "docs" / "dynamo.md", tmp_path) == ["dynamo_names.py"]
    with StatorProcess(command=(sys.executable, "dynamo_names.py"), directory=tmp_path, environment=environment):
        assert output_of("dynamo_client.py", environment) == ["hello", "from", "the", "other", "process"]
