"""Starts that fail say why in one line and leave nothing; what the command line shows of itself and of a cluster."""

import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from stator.testing.serve_process import StatorProcess, run_stator

pytestmark = pytest.mark.timeout(60)


def errors(process: StatorProcess) -> list[str]:
    """What tells the user that something went wrong."""
    return [line for line in process.lines if re.search(r"error|Error|ERROR|Traceback|WARN", line)]


FAILED = {
    "engine": (
        ["--engine", "ecko", "--workers", "2"],
        {},
        r"cannot start: stator.engines has no plug-in called 'ecko'; there are",
    ),
    "no model": (["--engine", "transformers"], {}, r"cannot start: the transformers engine needs a model"),
    "option": (["--option", "delay"], {}, r"cannot start: --option 'delay': expected NAME=VALUE"),
    "option name": (["-o", "dely=1"], {}, r"cannot start: EchoOptions has no setting 'dely'; did you mean 'delay'\?"),
    "option value": (["-o", "delay=soon"], {}, r"cannot start: argument delay='soon': expected a number"),
    "model": (["--engine", "echo", "--model", "/nowhere", "--workers", "2"], {}, r"cannot start: .*'/nowhere' is none"),
    "policy": (["--policy", "round_robbin"], {}, r"cannot start: no routing policy is called 'round_robbin' \(did you mean"),
}
REFUSED = {
    "namespace": (["--namespace", "a/b"], {}, r"'a/b'"),
    "host": (["--host", "0.0.0.0"], {}, r"host '0.0.0.0' is reachable from other machines .*--insecure-bind"),
    "setting": ([], {"STATOR_HTTP_PROT": "1"}, r"no setting is called 'STATOR_HTTP_PROT'; did you mean 'STATOR_HTTP_PORT'\?"),
    "plane": ([], {"STATOR_PLANE": "nativ"}, r"STATOR_PLANE='nativ'"),
    "discovery": ([], {"STATOR_DISCOVERY": "etcd9"}, r"stator.discovery has no plug-in called 'etcd9'"),
    "log": ([], {"STATOR_LOG": "loud"}, r"log level 'loud'"),
}


@pytest.mark.parametrize("case", FAILED | REFUSED)
def test_a_start_that_fails_is_one_line(case: str, tmp_path: Path) -> None:
    arguments, environment, line = (FAILED | REFUSED)[case]
    environment = {"TMPDIR": str(tmp_path), **environment}
    with StatorProcess("serve", "--isolated", "--port", "0", *arguments, environment=environment) as process:
        assert process.wait(30) == (2 if case in REFUSED else 1)
        assert len(errors(process)) == 1, process.output
        assert re.search(f"^error: .*{line}", errors(process)[0]), process.output
        assert process.children() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["serve", "frontend"])
def test_a_taken_port_is_said(command: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        found = run_stator(command, "--port", str(port))
    assert found.returncode == 2
    assert found.stderr.strip().endswith(f"error: cannot listen on 127.0.0.1:{port}: [Errno 98] Address already in use")


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[StatorProcess, StatorProcess]]:
    with (
        StatorProcess("serve", "--isolated", "--workers", "2", "--port", "0", "--name", "one") as first,
        StatorProcess("serve", "--isolated", "--port", "0", "--name", "two [b]") as second,
    ):
        first.wait_until_ready(workers=2)
        second.wait_until_ready()
        yield first, second


def root_of(process: StatorProcess) -> str:
    return process.wait_for(r"STATOR_FILE_ROOT=(\S+) stator ls").group(1)


def test_two_isolated_services_do_not_see_each_other(pair: tuple[StatorProcess, StatorProcess]) -> None:
    for process, name in zip(pair, ("one", "two [b]"), strict=True):
        with openai.OpenAI(base_url=f"{process.wait_until_ready()}/v1", api_key="none", timeout=10) as client:
            assert [model.id for model in client.models.list()] == [name]
            assert client.completions.create(model=name, prompt="hi").choices[0].text == "hi"
    assert root_of(pair[0]) != root_of(pair[1])


def test_a_second_service_on_the_same_port_is_refused(pair: tuple[StatorProcess, StatorProcess]) -> None:
    """Frontends of one service share their port; those of two must not, they would get each other's requests."""
    port = pair[0].wait_until_ready().rpartition(":")[2]
    found = run_stator("serve", "--isolated", "--port", port)
    assert found.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in found.stderr


def test_ls_shows_each_instance(pair: tuple[StatorProcess, StatorProcess]) -> None:
    found = run_stator("ls", environment={"STATOR_FILE_ROOT": root_of(pair[0])})
    assert (found.returncode, found.stderr) == (0, "")
    title, *rows, last = found.stdout.splitlines()
    assert title.split("  ")[0] == "endpoint"
    assert last == f"2 instances (file {root_of(pair[0])})"
    for row in rows:
        assert re.fullmatch(
            r"dynamo\.backend\.generate +[0-9a-f]+ +one +127\.0\.0\.1:\d+ +127\.0\.0\.1:\d+/[0-9a-f]+/generate +\w+ +\d+\.\d s ago *",
            row,
        ), row


def test_ls_as_json(pair: tuple[StatorProcess, StatorProcess]) -> None:
    found = run_stator("ls", "--json", environment={"STATOR_FILE_ROOT": root_of(pair[1])})
    (row,) = [json.loads(line) for line in found.stdout.splitlines()]
    assert row.keys() == {"endpoint", "instance", "model", "address", "native", "device", "seen", "stale"}
    assert (row["endpoint"], row["model"]) == ("dynamo.backend.generate", "two [b]")
    assert 0 <= row["seen"] < 10


def test_ls_of_nothing(tmp_path: Path) -> None:
    environment = {"STATOR_FILE_ROOT": str(tmp_path)}
    found = run_stator("ls", environment=environment)
    assert (found.returncode, found.stdout) == (0, f"nothing is registered (file {tmp_path})\n")
    found = run_stator("ls", "--json", environment=environment)
    assert (found.returncode, found.stdout) == (0, "")


def test_ls_with_an_unknown_setting_says_the_nearest() -> None:
    found = run_stator("ls", environment={"STATOR_FILE_ROT": "x"})
    assert found.returncode == 2
    assert found.stderr == "error: no setting is called 'STATOR_FILE_ROT'; did you mean 'STATOR_FILE_ROOT'?\n"


def flat(text: str) -> str:
    """Help without frames and line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def test_help_says_what_the_commands_are_for() -> None:
    found = run_stator("--help")
    assert found.returncode == 0
    text = flat(found.stdout)
    assert "an OpenAI-compatible endpoint, and any number of processes behind it" in text
    assert "serve Serve a model: frontends on one port and worker processes" in text
    assert "worker Run one worker process" in text
    assert "frontend Run one frontend process" in text
    assert "ls List what is registered" in text


def test_help_of_serve_explains_each_option() -> None:
    found = run_stator("serve", "--help")
    assert found.returncode == 0
    text = flat(found.stdout)
    assert "Without arguments it serves the echo model, which answers with your own words." in text
    for part in (
        "--model <str> Model: a directory or an id. Empty: the echo engine with its built-in tokenizer.",
        "--workers <int range> [x>=1] Worker processes. [default: 1]",
        "Port of the HTTP endpoint; 0: any free one [default: 8000].",
        "--option -o NAME=VALUE A setting of the engine; may be repeated.",
        "--isolated <bool> Use a discovery directory of its own, so that nobody else's workers are seen.",
        "--insecure-bind <bool> Allow plain HTTP beyond this machine.",
    ):
        assert part in text
    assert "supervised" not in text.replace("supervised until Ctrl-C", "")


def test_version() -> None:
    found = run_stator("--version")
    assert re.fullmatch(r"stator \d+\.\d+\.\d+\n", found.stdout)
