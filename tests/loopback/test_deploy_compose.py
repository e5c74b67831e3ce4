"""The services of deploy/compose as processes of this machine: their own commands, settings and health checks, a real etcd and NATS."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from stator.testing.etcd_server import etcd_server, free_ports
from stator.testing.nats_server import nats_server
from stator.testing.serve_process import StatorProcess, run_stator

pytestmark = pytest.mark.timeout(120)

SERVICES: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parents[2] / "deploy" / "compose" / "compose.yaml").read_text("utf-8")
)["services"]


class Machine:
    """What containers have of their own, as names in texts: hosts, ports, directories."""

    def __init__(self, names: dict[str, str], stack: ExitStack) -> None:
        self._names = names
        self._stack = stack

    def here(self, text: str) -> str:
        for name, found in self._names.items():
            text = text.replace(name, found)
        return text

    def start(self, name: str) -> StatorProcess:
        service = SERVICES[name]
        environment = {key: self.here(value) for key, value in service["environment"].items()}
        command = [self.here(word) for word in service["command"]]
        return self._stack.enter_context(StatorProcess(*command, environment=environment))

    def healthy(self, name: str) -> bool:
        _, program, *words = SERVICES[name]["healthcheck"]["test"]
        assert program == "python"
        asked = subprocess.run([sys.executable, *map(self.here, words)], capture_output=True, timeout=10, check=False)
        return asked.returncode == 0

    def wait_healthy(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not self.healthy(name):
            assert time.monotonic() < deadline, f"{name} is not healthy"
            time.sleep(0.2)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[tuple[Machine, str]]:
    """The machine, and a key for its endpoint."""
    secrets, run = tmp_path / "secrets", tmp_path / "run"
    secrets.mkdir(mode=0o700)
    run.mkdir(mode=0o700)
    (secrets / "cluster-secret").write_text("0123456789abcdef0123456789abcdef")
    added = run_stator("keys", "add", "--file", str(secrets / "api-keys"), "--name", "me")
    assert added.returncode == 0, added.stderr
    (key,) = [word for word in added.stdout.split() if word.startswith("sk-")]
    with ExitStack() as stack:
        etcd = stack.enter_context(etcd_server(tmp_path))
        nats = stack.enter_context(nats_server(tmp_path / "nats"))
        http, status = free_ports(2)
        names = {
            "etcd:2379": f"127.0.0.1:{etcd.client_port}",
            "nats:4222": f"127.0.0.1:{nats.port}",
            "/run/secrets": str(secrets),
            "/run/stator": str(run),
            "0.0.0.0": "127.0.0.1",
            "8000": str(http),
            "9090": str(status),
        }
        yield Machine(names, stack), key


def test_the_services_work_together(machine: tuple[Machine, str]) -> None:
    here, key = machine
    assert not here.healthy("worker")
    worker, frontend = here.start("worker"), here.start("frontend")
    here.wait_healthy("worker")
    here.wait_healthy("frontend")
    frontend.wait_for("echo")
    url = here.here("http://127.0.0.1:8000/v1")
    with openai.OpenAI(base_url=url, api_key=key, timeout=10) as client:
        assert client.completions.create(model="echo", prompt="hi").choices[0].text == "hi"
    stranger = openai.OpenAI(base_url=url, api_key="sk-another", timeout=10, max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.completions.create(model="echo", prompt="hi")
    began = time.monotonic()
    for process, limit in ((frontend, "frontend"), (worker, "worker")):
        process.send(signal.SIGTERM)
        assert process.wait(float(SERVICES[limit]["stop_grace_period"].rstrip("s"))) == 0, process.output
    assert time.monotonic() - began < 20, "nothing was going on"
