"""`stator certs`: an authority and certificates in one command, that are good for mutual TLS and are never overwritten."""

import os
import stat
import sys
from pathlib import Path

import pytest

from stator import settings
from stator.cli import certificate_maker
from stator.errors import UsageError
from stator.security import Tls, TlsConfig
from stator.tasks import SystemClock
from stator.testing.serve_process import run_stator
from unit.test_security_tls import shake

pytestmark = pytest.mark.timeout(60)


def settings_of(output: str, name: str) -> dict[str, str]:
    """What the command printed for one process."""
    lines = output.partition(f"# {name}\n")[2].partition("#")[0].split()
    return dict(line.split("=", 1) for line in lines)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_one_command_makes_everything_for_mutual_tls(tmp_path: Path) -> None:
    where = tmp_path / "certs"
    done = run_stator(
        "certs", "init", str(where), "--name", "worker-1", "--name", "frontend", "--host", "10.0.0.5", "--host", "gpu7.lan"
    )
    assert done.returncode == 0, done.stderr
    made = {path.name: mode(path) for path in where.iterdir()}
    assert made == {
        "ca.pem": 0o644,
        "ca-key.pem": 0o600,
        "worker-1.pem": 0o644,
        "worker-1-key.pem": 0o600,
        "frontend.pem": 0o644,
        "frontend-key.pem": 0o600,
    }
    assert mode(where) == 0o700
    assert "ca-key.pem" in done.stderr and "PRIVATE" not in done.stdout + done.stderr
    processes = [
        Tls(settings.load(TlsConfig, env=settings_of(done.stdout, name)), clock=SystemClock())
        for name in ("worker-1", "frontend")
    ]
    for worker, client in (processes, processes[::-1]):
        assert worker.mutual and worker.server_name == "stator"
        for name in ("stator", "127.0.0.1", "10.0.0.5", "gpu7.lan"):
            dialled, accepted = shake(worker.server_context(), client.client_context(), name)
            assert dialled.version() == "TLSv1.3" and accepted.getpeercert()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    assert run_stator("certs", "init", str(tmp_path / "certs")).returncode == 0
    before = {path: path.read_bytes() for path in (tmp_path / "certs").iterdir()}
    again = run_stator("certs", "init", str(tmp_path / "certs"))
    assert again.returncode == 2 and "not overwritten" in again.stderr and "certs issue" in again.stderr
    more = run_stator("certs", "issue", "worker", "--dir", str(tmp_path / "certs"))
    assert more.returncode == 2 and "--renew" in more.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "certs").iterdir()} == before


def test_another_certificate_and_a_renewed_one(tmp_path: Path) -> None:
    certificate_maker.make_authority(tmp_path / "certs")
    done = run_stator("certs", "issue", "worker-2", "--dir", str(tmp_path / "certs"))
    assert done.returncode == 0, done.stderr
    tls = Tls(settings.load(TlsConfig, env=settings_of(done.stdout, "worker-2")), clock=SystemClock())
    before = (tmp_path / "certs" / "worker-2-key.pem").read_bytes()
    assert not tls.look()
    renewed = run_stator("certs", "issue", "worker-2", "--dir", str(tmp_path / "certs"), "--renew", "--days", "1")
    assert renewed.returncode == 0, renewed.stderr
    assert (tmp_path / "certs" / "worker-2-key.pem").read_bytes() != before
    assert mode(tmp_path / "certs" / "worker-2-key.pem") == 0o600
    assert tls.look()
    shake(tls.server_context(), tls.client_context())


def test_without_an_authority_nothing_is_issued(tmp_path: Path) -> None:
    done = run_stator("certs", "issue", "worker", "--dir", str(tmp_path))
    assert done.returncode == 2 and "certs init" in done.stderr and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["ca", "../worker", "a b", "", "worker-key", "-x", "a" * 100])
def test_names_that_make_no_file(tmp_path: Path, name: str) -> None:
    certificate_maker.make_authority(tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError, match="name of a process"):
        certificate_maker.make_certificate(tmp_path, name, hosts=(), days=1, renew=False)
    assert sorted(tmp_path.iterdir()) == before


def test_a_host_that_is_none(tmp_path: Path) -> None:
    certificate_maker.make_authority(tmp_path)
    with pytest.raises(UsageError, match="neither an address nor a host name"):
        certificate_maker.make_certificate(tmp_path, "worker", hosts=("not a host",), days=1, renew=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ca-key.pem", "ca.pem"]


def test_keys_are_private_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        certificate_maker.make_authority(tmp_path / "certs")
        certificate_maker.make_certificate(tmp_path / "certs", "worker", hosts=(), days=1, renew=False)
    finally:
        os.umask(before)
    assert mode(tmp_path / "certs" / "worker-key.pem") == mode(tmp_path / "certs" / "ca-key.pem") == 0o600
    assert mode(tmp_path / "certs") == 0o700


def test_a_missing_library_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "cryptography").mkdir()
    (tmp_path / "cryptography" / "__init__.py").write_text("raise ImportError('not here')")
    done = run_stator("certs", "init", str(tmp_path / "certs"), environment={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and "stator[certs]" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "certs").exists()


def test_the_room_needs_no_library() -> None:
    import subprocess

    code = "import sys, stator.security, stator.runtime, stator.transports.native; print('cryptography' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
