"""What a default `stator serve` shows to the network, a service with every secret set, and what of those can be seen anywhere."""

import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path

import psutil
import pytest

from stator.testing.certificates import Authority
from stator.testing.etcd_server import EtcdServer
from stator.testing.nats_server import nats_server
from stator.testing.serve_process import StatorProcess, running

pytestmark = [pytest.mark.timeout(120), pytest.mark.load]  # once is enough: the processes choose their own loop

SECRET = "correct horse battery staple"
API_KEY = "sk-not-to-be-seen-anywhere"


def processes(service: StatorProcess) -> list[psutil.Process]:
    """It and all it started."""
    root = psutil.Process(service.process.pid)
    return [root, *root.children(recursive=True)]


def sockets_of(pid: int) -> Iterator[tuple[str, str, int]]:
    """TCP sockets that listen, and UDP sockets, of one process: kind, address, port."""
    for entry in psutil.Process(pid).net_connections("inet"):
        if entry.type == socket.SOCK_DGRAM or entry.status == psutil.CONN_LISTEN:
            assert entry.laddr
            yield entry.type.name, entry.laddr.ip, entry.laddr.port


def test_a_default_service_is_on_loopback_alone(tmp_path: Path) -> None:
    environment = {"STATOR_FILE_ROOT": str(tmp_path / "cluster"), "XDG_RUNTIME_DIR": str(tmp_path)}
    tmp_path.chmod(0o700)
    with StatorProcess("serve", "--port", "0", "--workers", "2", environment=environment) as service:
        service.wait_until_ready(workers=2)
        found = [each for process in processes(service) for each in sockets_of(process.pid)]
        assert {kind for kind, _, _ in found} == {"SOCK_STREAM", "SOCK_DGRAM"}, found  # the pulse is UDP
        abroad = [
            each
            for each in found
            if each[1] not in ("127.0.0.1", "::1") and not (each[0] == "SOCK_DGRAM" and _unreachable(each))
        ]
        assert not abroad
        for path in (tmp_path / "stator" / "sockets").iterdir():
            assert path.parent.stat().st_mode & 0o077 == 0
        for address in _others():  # and tried: nobody answers at the addresses of this machine
            for kind, _, port in found:
                if kind == "SOCK_STREAM":
                    with socket.socket() as probe:
                        probe.settimeout(0.5)
                        assert probe.connect_ex((address, port)) != 0, f"{address}:{port} answers"


def _unreachable(each: tuple[str, str, int]) -> bool:
    """A UDP socket that asks: bound by the kernel to no address with its first question, it hears answers alone."""
    return each[1] in ("0.0.0.0", "::") and each[2] >= 1024


def _others() -> list[str]:
    """Addresses of this machine that others can reach."""
    found = [entry.address for entries in psutil.net_if_addrs().values() for entry in entries if entry.family == socket.AF_INET]
    return [address for address in found if not address.startswith("127.")]


@pytest.mark.parametrize("setting", ["STATOR_HOST", "DYN_TCP_RPC_HOST"])
def test_no_worker_listens_elsewhere_without_permission(setting: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stator", "worker"],
        env={**os.environ, setting: "0.0.0.0", "STATOR_FILE_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert "insecure_bind" in done.stderr and "STATOR_CLUSTER_SECRET" in done.stderr and len(done.stderr.splitlines()) == 1


def test_secrets_are_seen_nowhere(tmp_path: Path) -> None:
    """In no log at its most talkative, no command line, no metric, no page of the status server, while all of them are used."""
    authority = Authority(tmp_path)
    cert, key = authority.issue("process")
    (tmp_path / "secret").write_text(SECRET)
    environment = {
        "STATOR_FILE_ROOT": str(tmp_path / "cluster"),
        "STATOR_CLUSTER_SECRET_FILE": str(tmp_path / "secret"),
        "STATOR_TLS_CERT_PATH": str(cert),
        "STATOR_TLS_KEY_PATH": str(key),
        "STATOR_TLS_CA_CERT_PATH": str(authority.path),
        "STATOR_TLS_CLIENT_CA_CERT_PATH": str(authority.path),
        "STATOR_TLS_SERVER_NAME": "stator",
        "STATOR_NATIVE_UNIX": "false",
        "NATS_AUTH_USERNAME": "somebody",
        "NATS_AUTH_PASSWORD": "nats-password-unseen",
        "ETCD_AUTH_USERNAME": "somebody",
        "ETCD_AUTH_PASSWORD": "etcd-password-unseen",
        "STATOR_LOG": "debug",
        "STATOR_HEALTH_PORT": "0",
    }
    hidden = [SECRET, "nats-password-unseen", "etcd-password-unseen", API_KEY, *_lines(key)]
    with StatorProcess("serve", "--port", "0", environment=environment) as service:
        url = service.wait_until_ready()
        answer = _ask(url)
        assert "hello there" in answer
        everything = [service.output, answer]
        for process in processes(service):
            everything.append(" ".join(process.cmdline()))
            for kind, address, port in sockets_of(process.pid):
                if kind == "SOCK_STREAM":
                    everything += [
                        _get(f"http://{address}:{port}{path}") for path in ("/health", "/live", "/metrics", "/metadata")
                    ]
        pages = "".join(everything)
        assert "stator_requests_total" in pages  # the status pages were among them
        pids = [process.pid for process in processes(service)]
    assert not running(pids)
    everything.append(service.output)
    for text in everything:
        for secret in hidden:
            assert secret not in text


@pytest.mark.parametrize("right", [True, False], ids=["logged in", "refused"])
def test_passwords_of_servers_are_seen_nowhere(right: bool, tmp_path: Path) -> None:
    password = "server-password-unseen"
    login = f'{{user: stator, password: "{password if right else "another one"}"}}'
    etcd = EtcdServer(tmp_path / "etcd")
    with nats_server(tmp_path / "nats", settings={"authorization": login}) as nats:
        etcd.start()
        try:
            etcd.add_user("stator", password if right else "another one")
            environment = {
                "ETCD_ENDPOINTS": etcd.url,
                "ETCD_AUTH_USERNAME": "stator",
                "ETCD_AUTH_PASSWORD": password,
                "NATS_SERVER": nats.url,
                "NATS_AUTH_USERNAME": "stator",
                "NATS_AUTH_PASSWORD": password,
                "STATOR_EVENT_PLANE": "nats",
                "STATOR_LOG": "debug",
                "STATOR_HEALTH_PORT": "0",
            }
            arguments = ("serve", "--port", "0", "--discovery", "etcd", "--request-plane", "nats")
            with StatorProcess(*arguments, environment=environment) as service:
                if right:
                    assert "hello there" in _ask(service.wait_until_ready())
                else:
                    service.wait_for(r"(?i)auth|password|credential|log.?in|permission|user", timeout=30)
                seen = [service.output, *(" ".join(process.cmdline()) for process in processes(service))]
                for process in processes(service):
                    for kind, address, port in sockets_of(process.pid):
                        if kind == "SOCK_STREAM":
                            seen += [_get(f"http://{address}:{port}{path}") for path in ("/health", "/metrics", "/metadata")]
            seen.append(service.output)
        finally:
            etcd.kill()
    assert all(password not in text for text in seen)


def _lines(key: Path) -> list[str]:
    """The lines of a key that are its own."""
    return [line for line in key.read_text().splitlines() if not line.startswith("-----")]


def _ask(url: str) -> str:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=b'{"model": "echo", "messages": [{"role": "user", "content": "hello there"}]}',
        headers={"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        return str(answer.read().decode())


def _get(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return str(answer.read().decode())
    except (OSError, HTTPException) as error:  # a listener that speaks no HTTP, or no such page
        return str(error)
