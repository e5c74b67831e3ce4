"""The README and the documentation show what runs: blocks, commands and links."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from stator.testing.documents import commands, links, write_blocks
from stator.testing.engine_cases import CASES
from stator.testing.serve_process import StatorProcess, run_stator

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCUMENTS = sorted([README, ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md", *(ROOT / "docs").glob("*.md")])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A cluster and a port of its own; everything else is as written."""
    return {
        "STATOR_FILE_ROOT": str(tmp_path / "cluster"),
        "STATOR_HTTP_PORT": "0",
        "STATOR_WORKER_GRACE_PERIOD": "0",
        "PYTHONUNBUFFERED": "1",
    }


@contextmanager
def script(path: Path, environment: dict[str, str]) -> Iterator[StatorProcess]:
    with StatorProcess(command=(sys.executable, path.name), directory=path.parent, environment=environment) as process:
        yield process


def output_of(path: Path, environment: dict[str, str]) -> list[str]:
    """What a script prints; it must succeed."""
    with script(path, environment) as process:
        status = process.wait(30)
        assert status == 0, process.output
        return process.lines


def command(line: str, environment: dict[str, str], directory: Path) -> StatorProcess:
    """A shown command, word by word."""
    first, *arguments = shlex.split(line)
    assert first == "stator"
    return StatorProcess(*arguments, environment=environment, directory=directory)


def shown(document: Path, prefix: str) -> str:
    """The one command of a document that begins so."""
    (line,) = [line for line in commands(document) if line.startswith(prefix)]
    return line


def test_worker_and_client(tmp_path: Path, environment: dict[str, str]) -> None:
    assert {"worker.py", "client.py"} <= set(write_blocks(README, tmp_path))
    with script(tmp_path / "worker.py", environment):
        assert output_of(tmp_path / "client.py", environment) == ["hello", "world"]


def test_serve_ls_and_any_openai_client(tmp_path: Path, environment: dict[str, str]) -> None:
    write_blocks(README, tmp_path)
    with command(shown(README, "stator serve --workers"), environment, tmp_path) as service:
        url = service.wait_until_ready(workers=2)
        listed = run_stator(*shlex.split(shown(README, "stator ls"))[1:], environment=environment)
        assert "2 instances" in listed.stdout
        chat = tmp_path / "chat.py"
        source = chat.read_text("utf-8")
        assert "http://127.0.0.1:8000" in source
        chat.write_text(source.replace("http://127.0.0.1:8000", url), encoding="utf-8")
        assert output_of(chat, environment) == ["Grüße aus einem Strom 👋"]


def test_an_engine_of_your_own(tmp_path: Path, environment: dict[str, str]) -> None:
    write_blocks(README, tmp_path)
    (line,) = re.findall(r"`(stator serve --engine reverse[^`]*)`", README.read_text("utf-8"))
    with command(line, environment, tmp_path) as service:
        url = service.wait_until_ready(workers=4)
        assert ask(url, "reverse", "drawer", tmp_path, environment) == ["reward"]


def ask(url: str, model: str, prompt: str, directory: Path, environment: dict[str, str]) -> list[str]:
    source = f"""
from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="unused")
print(client.completions.create(model="{model}", prompt="{prompt}", max_tokens=10).choices[0].text)
"""
    (directory / "ask.py").write_text(source, encoding="utf-8")
    return output_of(directory / "ask.py", environment)


def test_the_function_of_the_engine_page_serves(tmp_path: Path, environment: dict[str, str]) -> None:
    page = ROOT / "docs" / "engines.md"
    write_blocks(page, tmp_path)
    with command(shown(page, "stator serve --engine shout"), environment, tmp_path) as service:
        assert ask(service.wait_until_ready(), "shout", "hello", tmp_path, environment) == ["HELLO"]


def test_the_engine_of_the_engine_page_serves_and_passes_the_suite(tmp_path: Path, environment: dict[str, str]) -> None:
    page = ROOT / "docs" / "engines.md"
    assert write_blocks(page, tmp_path) == ["shout.py", "alphabet.py", "test_alphabet.py"]
    with command(shown(page, "stator serve --engine alphabet"), environment, tmp_path) as service:
        url = service.wait_until_ready()
        assert ask(url, "alphabet", "x", tmp_path, environment) == ["ABCDEFGHIJ"]
    pytest_command = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-o",
        "asyncio_mode=auto",
        "test_alphabet.py",
    )
    with StatorProcess(command=pytest_command, directory=tmp_path, environment=environment) as suite:
        assert suite.wait(50) == 0, suite.output
        assert f"{len(CASES)} passed" in suite.lines[-1]


def test_the_blocks_of_the_runtime_page(tmp_path: Path, environment: dict[str, str]) -> None:
    assert write_blocks(ROOT / "docs" / "runtime.md", tmp_path) == ["runtime.py", "cancellation.py", "conversation.py"]
    assert output_of(tmp_path / "runtime.py", environment) == ["{'echo': {'prompt': 'hi'}}"]
    assert output_of(tmp_path / "cancellation.py", environment) == ["handler ended", "stopped", "handler ended"]
    assert output_of(tmp_path / "conversation.py", environment) == ["HELLO", "WORLD", "2 words", "['AGAIN', '1 words']"]


def test_several_models_in_one_cluster(tmp_path: Path, environment: dict[str, str]) -> None:
    page = ROOT / "docs" / "serving.md"
    frontend, *workers = [line for line in commands(page) if re.match(r"stator (frontend|worker)", line)]
    with (
        command(frontend.replace("8000", "0"), environment, tmp_path) as http,
        command(workers[0], environment, tmp_path),
        command(workers[1], environment, tmp_path),
    ):
        for model in ("one", "two"):
            http.wait_for(f"model {model} is served")
        url = http.wait_for(r"listening on (http://\S+)").group(1)
        assert [ask(url, model, model, tmp_path, environment) for model in ("one", "two")] == [["one"], ["two"]]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in links(document):
        path, _, heading = target.partition("#")
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text("utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_installed_or_made_exists(document: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    for line in commands(document):
        if found := re.match(r'pip install "stator\[(.*)\]"', line):
            assert set(found.group(1).split(",")) <= extras.keys(), line
        elif line.startswith("make "):
            assert line.split()[1] in targets, line
        elif line.startswith("stator "):
            words = shlex.split(line.partition(" && ")[0], comments=True)
            names = words[1:3] if words[1] in ("keys", "certs") else words[1:2]
            assert {word for word in words if word.startswith("--")} <= options_of(*names), line


def test_make_serve_is_the_shown_service_beside_others() -> None:
    """Two of them may run side by side: a free port, and a discovery directory of its own."""
    planned = subprocess.run(
        ["make", "--no-print-directory", "-n", "serve"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout
    words = planned.splitlines()[-1].split()
    assert words[0].endswith("/stator")
    assert words[1:] == ["serve", "--engine", "echo", "--workers", "2", "--port", "0", "--isolated"]


@cache
def options_of(*command: str) -> set[str]:
    return set(re.findall(r"--[a-z-]+", run_stator(*command, "--help").stdout))
