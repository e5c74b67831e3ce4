"""`--discovery` and `--request-plane`: a whole service over etcd and NATS, what `stator ls` says of it, and what is refused."""

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from stator.cli.joining import Joining
from stator.cli.listing import where
from stator.discovery import DiscoveryStatus
from stator.errors import ConfigError
from stator.runtime.discovery_choice import choose_discovery, discovery_name
from stator.testing.etcd_server import EtcdServer, etcd_server
from stator.testing.nats_server import NatsServer, nats_server
from stator.testing.serve_process import StatorProcess, run_stator, wait_gone

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EtcdServer]:
    with etcd_server(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture(scope="module")
def nats(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with nats_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


def place(server: EtcdServer) -> str:
    return f"etcd://127.0.0.1:{server.client_port}"


def answers(url: str) -> list[str]:
    """What the model `echo` says to a few requests."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=10, max_retries=0) as client:
        return [client.completions.create(model="echo", prompt=f"number {n}").choices[0].text for n in range(4)]


def test_a_service_over_etcd_and_nats(etcd: EtcdServer, nats: NatsServer) -> None:
    """All requests go over NATS: with `--plane compatible` nothing else is in the workers' records."""
    arguments = ["--discovery", place(etcd), "--plane", "compatible", "--request-plane", "nats", "--workers", "2"]
    with StatorProcess("serve", *arguments, "--port", "0", environment={"STATOR_NATS_SERVERS": nats.url}) as service:
        url = service.wait_until_ready(workers=2)
        children = service.children()
        assert answers(url) == [f"number {n}" for n in range(4)]

        found = run_stator("ls", "--discovery", place(etcd))
        assert (found.returncode, found.stderr) == (0, "")
        *rows, last = found.stdout.splitlines()[1:]
        assert last == f"2 instances (etcd {etcd.url})"
        for row in rows:
            assert "  nats " in row
            assert "echo" in row

        service.send(signal.SIGTERM)
        assert service.wait(30) == 0, service.output
        assert len(children) == 3
        assert wait_gone(children) == []
    assert etcd.keys() == {}, "whoever leaves takes his records along"
    assert etcd.leases() == []


def test_a_service_over_etcd_and_http2(etcd: EtcdServer) -> None:
    arguments = ["--discovery", place(etcd), "--plane", "compatible", "--request-plane", "http2"]
    with StatorProcess("serve", *arguments, "--port", "0") as service:
        assert answers(service.wait_until_ready()) == [f"number {n}" for n in range(4)]
        found = run_stator("ls", "--json", "--discovery", place(etcd))
        (row,) = [json.loads(line) for line in found.stdout.splitlines()]
        assert row["address"].startswith("http://127.0.0.1:")
        assert (row["native"], row["stale"]) == ("", None)
        assert 0 <= row["seen"] < 10
        for child in service.children():
            line = Path(f"/proc/{child}/cmdline").read_text("utf-8")
            assert "etcd" not in line, "children inherit it, no list of processes shows it"
        service.send(signal.SIGTERM)
        assert service.wait(30) == 0, service.output
    assert etcd.keys() == {}


def test_a_worker_and_a_frontend_meet_in_a_directory(tmp_path: Path) -> None:
    there = f"file://{tmp_path}"
    with (
        StatorProcess("worker", "--discovery", there, "--name", "echo") as worker,
        StatorProcess("frontend", "--discovery", there, "--port", "0") as frontend,
    ):
        worker.wait_for("dynamo.backend.generate")
        url = frontend.wait_for(r"listening on (http://\S+)").group(1)
        frontend.wait_for("echo")
        assert answers(url) == [f"number {n}" for n in range(4)]


def test_ls_says_where_it_asked_in_vain(tmp_path: Path) -> None:
    environment = {"STATOR_ETCD_START_TIMEOUT": "0.2"}
    found = run_stator("ls", "--discovery", "etcd://127.0.0.1:1,127.0.0.1:2", environment=environment)
    assert (found.returncode, found.stdout) == (1, "")
    assert "error: cannot reach etcd at http://127.0.0.1:1,http://127.0.0.1:2" in found.stderr


def test_what_was_known_is_told_from_what_is() -> None:
    status = DiscoveryStatus(backend="etcd", location="http://a:2379")
    assert where(status, 50.0) == "etcd http://a:2379"
    stale = DiscoveryStatus(backend="etcd", location="http://a:2379", stale_since=47.5, reason="refused")
    assert where(stale, 50.0) == "etcd http://a:2379, which has not answered for 2.5 s: refused"


REFUSED = {
    "memory": (["--discovery", "memory"], "discovery = memory is for the parts of one process, and serve starts several"),
    "memory plane": (["--plane", "memory"], "plane = memory is for the parts of one process"),
    "isolated": (["--isolated", "--discovery", "file:///x"], "--isolated makes a directory for discovery"),
    "unknown": (["--discovery", "etc://a"], "stator.discovery has no plug-in called 'etc'; there are: etcd, file"),
    "member": (["--discovery", "etcd://a:b"], "etcd.endpoints (ETCD_ENDPOINTS) has 'a:b'"),
    "plane": (["--request-plane", "carrier"], "argument request_plane='carrier': expected one of tcp, nats, http2"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_places_where_processes_would_not_meet_are_refused(case: str) -> None:
    arguments, words = REFUSED[case]
    found = run_stator("serve", "--port", "0", *arguments)
    assert found.returncode == 2, found.stderr
    assert f"error: {words}" in found.stderr
    assert found.stdout == ""


@pytest.mark.parametrize("command", ["serve", "worker", "frontend", "ls"])
def test_passwords_are_no_part_of_a_place(command: str) -> None:
    found = run_stator(command, "--discovery", "etcd://root:hunter2@one:2379,two:2379")
    assert found.returncode == 2
    assert "set STATOR_ETCD_USERNAME and STATOR_ETCD_PASSWORD (or …_FILE)" in found.stderr
    assert "hunter2" not in found.stderr + found.stdout


def test_children_are_told_what_was_said_and_nothing_else() -> None:
    assert Joining().variables == {}
    said = Joining(discovery="file:///x", request_plane="nats", compatible=True)
    assert said.settings == {"discovery": "file:///x", "request_plane": "nats", "compatible": True}
    assert said.variables == {"STATOR_DISCOVERY": "file:///x", "STATOR_REQUEST_PLANE": "nats", "STATOR_COMPATIBLE": "true"}


@pytest.mark.parametrize("compatible", [False, True])
def test_with_a_secret_the_compatible_planes_are_spoken_if_that_is_said(compatible: bool, tmp_path: Path) -> None:
    environment = {"STATOR_CLUSTER_SECRET": "0123456789abcdef"}
    flags = ["--compatible"] if compatible else []
    there = f"file://{tmp_path}"
    with StatorProcess("worker", "--discovery", there, *flags, environment=environment) as worker:
        worker.wait_for("dynamo.backend.generate")
        found = run_stator("ls", "--json", "--discovery", there, environment=environment)
        (row,) = [json.loads(line) for line in found.stdout.splitlines()]
    assert bool(row["address"]) is compatible
    assert row["native"]


def test_the_rest_of_a_place_is_one_setting() -> None:
    def setting(text: str, name: str) -> object:
        return getattr(choose_discovery(text, {})[1], name)

    assert setting("etcd://one:2379,two:2379", "endpoints") == ("one:2379", "two:2379")
    assert setting("etcd://https://one:2379", "endpoints") == ("https://one:2379",)
    assert setting("file:///var/lib/stator@home", "root") == "/var/lib/stator@home"
    assert setting("kubernetes://prod", "namespace") == "prod"
    assert setting("kubernetes://", "namespace") == setting("kubernetes", "namespace")
    _, config = choose_discovery("file:///one", {"file.root": "/two", "file.ttl": 3.0})
    assert (getattr(config, "root"), getattr(config, "ttl")) == ("/two", 3.0)  # noqa: B009
    with pytest.raises(ConfigError, match="memory has no place that could be named"):
        choose_discovery("memory://here", {})
    assert discovery_name("memory") == discovery_name("memory://") == "memory"
