"""deploy/systemd and deploy/compose: they parse, every command line and setting in them exists, and ends have the time they need."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from stator import settings
from stator.cli.commands import app
from stator.frontend import FrontendConfig
from stator.health import HealthConfig
from stator.runtime.config import RuntimeConfig
from stator.runtime.discovery_choice import choose_discovery
from stator.testing.etcd_server import find_etcd
from stator.testing.nats_server import find_nats_server
from stator.worker import WorkerConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
SYSTEMD = DEPLOY / "systemd"
UNITS = sorted(path.name for path in SYSTEMD.glob("*.service"))
MARGIN = 5.0
"""seconds that `stator serve` gives its children beyond what their settings allow them"""

Section = dict[str, list[str]]


def unit(name: str) -> dict[str, Section]:
    """A unit file: sections of directives, which may come several times."""
    found: dict[str, Section] = {}
    section: Section = {}
    for line in (SYSTEMD / name).read_text("utf-8").splitlines():
        if not line or line.startswith("#"):
            continue
        if title := re.fullmatch(r"\[(\w+)\]", line):
            section = found.setdefault(title[1], {})
            continue
        directive, separator, value = line.partition("=")
        assert separator, line
        section.setdefault(directive, []).append(value)
    return found


def variables(lines: list[str]) -> dict[str, str]:
    """`Environment=` lines, or those of an environment file, without what is commented out."""
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


ENVIRONMENT_FILE = (SYSTEMD / "stator.env").read_text("utf-8").splitlines()
COMMENTED = variables([line[1:] for line in ENVIRONMENT_FILE if re.match(r"#[A-Z_]+=", line)])
"""settings that are offered"""


def accepts(arguments: list[str]) -> dict[str, Any]:
    """Let the command line's own parser read `arguments`; what it made of them."""
    commands: Any = typer.main.get_command(app)
    name, *options = arguments
    assert name in commands.commands, f"no such command: {name}"
    with commands.commands[name].make_context(name, options) as context:
        return dict(context.params)


def check_variables(found: dict[str, str], tmp_path: Path) -> None:
    """Every setting exists and takes its value."""
    ours = {name: value for name, value in found.items() if name.startswith("STATOR_")}
    settings.check_names(env=ours)
    plain = {name: value for name, value in ours.items() if not name.endswith("_FILE")}
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef")
    plain |= {name: str(secret) for name in ours if name.endswith("_FILE")}
    for config in (RuntimeConfig, FrontendConfig, HealthConfig, WorkerConfig):
        settings.load(config, env=plain)
    choose_discovery(settings.load(RuntimeConfig, env=plain).discovery, {})


def ending(env: dict[str, str]) -> dict[str, float]:
    """Seconds that each command may take to end."""
    worker, frontend = settings.load(WorkerConfig, env=env), settings.load(FrontendConfig, env=env)
    ends = worker.grace_period + worker.drain_timeout + worker.cleanup_timeout
    return {
        "worker": ends,
        "frontend": frontend.graceful_shutdown,
        "serve": frontend.graceful_shutdown + MARGIN + ends + MARGIN,
    }


# systemd


def test_there_is_a_unit_for_each_way_to_run() -> None:
    assert UNITS == ["stator-frontend.service", "stator-worker@.service", "stator.service"]


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_runs_a_command_that_exists(name: str) -> None:
    service = unit(name)["Service"]
    (line,) = service["ExecStart"]
    program, command, options = line.split(" ")
    assert program == "/opt/stator/bin/stator"
    assert options == f"${command.upper()}_OPTIONS"
    assert variables(service["Environment"])[options[1:]] == "", "without the file nothing is said"
    assert accepts([command]) is not None
    example = variables(ENVIRONMENT_FILE)[options[1:]]
    assert example
    accepts([command, *shlex.split(example)])


def test_the_parser_refuses_what_does_not_exist() -> None:
    with pytest.raises(Exception, match="No such option"):
        accepts(["worker", "--no-such-option"])
    with pytest.raises(AssertionError, match="no such command"):
        accepts(["wroker"])


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_gives_the_time_that_ending_takes(name: str) -> None:
    service = unit(name)["Service"]
    command = service["ExecStart"][0].split(" ")[1]
    env = {key: value for key, value in variables(ENVIRONMENT_FILE).items() if key.startswith("STATOR_")}
    assert service["KillSignal"] == ["SIGTERM"]
    assert service["KillMode"] == ["mixed"], "the supervisor ends its children itself"
    needed = ending(env)[command]
    assert needed < float(service["TimeoutStopSec"][0]) <= max(needed + 45, 45)
    assert service["RestartPreventExitStatus"] == ["2"], "a wrong command line"


@pytest.mark.parametrize("name", UNITS)
def test_a_unit_may_do_little(name: str) -> None:
    service = unit(name)["Service"]
    assert service["User"] == ["stator"]
    assert service["CapabilityBoundingSet"] == [""]
    for directive in ("NoNewPrivileges", "ProtectHome", "PrivateTmp", "ProtectKernelTunables", "RestrictSUIDSGID"):
        assert service[directive] == ["yes"], directive
    assert service["ProtectSystem"] == ["strict"]
    assert service["RuntimeDirectoryMode"] == ["0700"]
    assert variables(service["Environment"])["XDG_RUNTIME_DIR"] == f"%t/{service['RuntimeDirectory'][0]}"
    assert service["RuntimeDirectoryPreserve"] == ["yes"], "instances share it, and the first to stop would remove it"


def test_a_worker_reads_settings_of_its_own_last() -> None:
    files = unit("stator-worker@.service")["Service"]["EnvironmentFile"]
    assert files == ["-/etc/stator/stator.env", "-/etc/stator/worker-%i.env"]


def test_every_setting_of_the_environment_file_exists(tmp_path: Path) -> None:
    active = variables(ENVIRONMENT_FILE)
    assert len(COMMENTED) >= 3
    check_variables(active, tmp_path)
    check_variables({**active, **COMMENTED, "STATOR_INSECURE_BIND": "true"}, tmp_path)
    for name in active.keys() | COMMENTED.keys():
        assert name.startswith("STATOR_") or f"${name}" in "".join((SYSTEMD / each).read_text("utf-8") for each in UNITS)


def test_the_secret_is_read_from_a_credential(tmp_path: Path) -> None:
    service = unit("secret.conf")["Service"]
    (credential,) = service["LoadCredential"]
    found = variables(service["Environment"])
    assert found["STATOR_CLUSTER_SECRET_FILE"] == f"%d/{credential.partition(':')[0]}"
    check_variables(found, tmp_path)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze, which this machine does not have")
@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize("secret", [False, True], ids=["plain", "with the secret"])
def test_systemd_takes_the_units(name: str, secret: bool, tmp_path: Path) -> None:
    text = (SYSTEMD / name).read_text("utf-8")
    (tmp_path / name).write_text(text.replace("/opt/stator/bin/stator", sys.executable))
    if secret:
        (tmp_path / f"{name}.d").mkdir()
        shutil.copy(SYSTEMD / "secret.conf", tmp_path / f"{name}.d" / "secret.conf")
    found = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / name)], capture_output=True, text=True, timeout=60, check=False
    )
    said = [line for line in (found.stdout + found.stderr).splitlines() if "stator" in line]
    assert (found.returncode, said) == (0, [])
    exposure = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=25", str(tmp_path / name)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert exposure.returncode == 0, exposure.stdout[-300:]


# Compose

COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = ("frontend", "worker")
KEYS = {
    *(
        "image",
        "build",
        "init",
        "restart",
        "read_only",
        "cap_drop",
        "security_opt",
        "tmpfs",
        "secrets",
        "depends_on",
        "volumes",
    ),
    *("command", "environment", "ports", "stop_grace_period", "healthcheck", "deploy"),
}
"""those of a service that are in use; anything else is a slip"""


def seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+)s", text)
    assert match, text
    return float(match[1])


def environment(name: str) -> dict[str, str]:
    found = SERVICES[name]["environment"]
    assert all(isinstance(value, str) for value in found.values()), "YAML would change numbers and truth values"
    return dict(found)


def test_what_a_compose_service_says_fits_together() -> None:
    assert SERVICES.keys() == {*OURS, "etcd", "nats"}
    assert {key for key in COMPOSE if not key.startswith("x-")} == {"name", "services", "secrets", "volumes"}
    for service in SERVICES.values():
        assert service.keys() <= KEYS, service.keys() - KEYS
        assert set(service.get("depends_on", {})) <= SERVICES.keys()
        assert set(service.get("secrets", [])) <= COMPOSE["secrets"].keys()
        assert {volume.partition(":")[0] for volume in service.get("volumes", [])} <= COMPOSE["volumes"].keys()
        check = service["healthcheck"]
        assert check["test"][0] == "CMD"
        assert seconds(check["timeout"]) <= seconds(check["interval"])
    for name in OURS:
        assert {each["condition"] for each in SERVICES[name]["depends_on"].values()} == {"service_healthy"}
        build = SERVICES[name]["build"]
        assert ((DEPLOY / "compose" / build["context"]).resolve() / build["dockerfile"]).is_file()


@pytest.mark.parametrize("name", OURS)
def test_every_setting_of_a_service_exists(name: str, tmp_path: Path) -> None:
    found = environment(name)
    assert all(key.startswith("STATOR_") or key == "XDG_RUNTIME_DIR" for key in found)
    check_variables(found, tmp_path)
    config = settings.load(RuntimeConfig, env={k: v for k, v in found.items() if not k.endswith("_FILE")})
    _, discovery = choose_discovery(config.discovery, {})
    assert getattr(discovery, "endpoints") == ("etcd:2379",)  # noqa: B009
    assert f"--advertise-client-urls=http://{getattr(discovery, 'endpoints')[0]}" in SERVICES["etcd"]["command"]  # noqa: B009


@pytest.mark.parametrize("name", OURS)
def test_secrets_are_files(name: str) -> None:
    mounted = {f"/run/secrets/{secret}" for secret in SERVICES[name]["secrets"]}
    used = {value for value in environment(name).values() if value.startswith("/run/secrets/")}
    assert used == mounted
    for secret in COMPOSE["secrets"].values():
        assert secret.keys() == {"file"}


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_a_command_that_exists_and_may_end_in_peace(name: str) -> None:
    service = SERVICES[name]
    accepts(service["command"])
    env = {key: value for key, value in environment(name).items() if not key.endswith("_FILE")}
    needed = ending(env)[service["command"][0]]
    assert needed < seconds(service["stop_grace_period"]) <= needed + 15


def test_health_is_asked_where_it_is_told() -> None:
    worker = settings.load(HealthConfig, env={k: v for k, v in environment("worker").items() if not k.endswith("_FILE")})
    assert f"http://127.0.0.1:{worker.port}{worker.health_path}" in SERVICES["worker"]["healthcheck"]["test"][-1]
    frontend = settings.load(FrontendConfig, env={k: v for k, v in environment("frontend").items() if not k.endswith("_FILE")})
    assert f"http://127.0.0.1:{frontend.port}/live" in SERVICES["frontend"]["healthcheck"]["test"][-1]
    (port,) = SERVICES["frontend"]["ports"]
    assert port == f"127.0.0.1:{frontend.port}:{frontend.port}", "for this machine alone"
    assert all("ports" not in service for name, service in SERVICES.items() if name != "frontend")
    for name in OURS:
        compile(SERVICES[name]["healthcheck"]["test"][-1], name, "exec")


def test_etcd_and_nats_know_their_options() -> None:
    for name, binary in (("etcd", find_etcd()), ("nats", find_nats_server())):
        assert binary is not None
        shown = subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=30, check=False)
        for option in (word.partition("=")[0] for word in SERVICES[name]["command"] if word.startswith("--")):
            assert re.search(rf"{option}[ ,]", shown.stdout + shown.stderr), option
    control = Path(find_etcd() or "").with_name("etcdctl")
    shown = subprocess.run([str(control), "endpoint", "--help"], capture_output=True, text=True, timeout=30, check=False)
    assert "health" in shown.stdout


def test_the_image_has_what_the_build_needs() -> None:
    lines = (DEPLOY / "compose" / "Dockerfile").read_text("utf-8").splitlines()
    words = [line.split() for line in lines if line and not line.startswith("#")]
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "STOPSIGNAL", "ENTRYPOINT"}
    assert {word[0] for word in words} <= known
    for instruction, *rest in words:
        if instruction == "COPY" and not rest[0].startswith("--from"):
            for source in rest[:-1]:
                assert (DEPLOY.parent / source).exists(), source
    assert ["USER", "65532:65532"] in words
    assert ["STOPSIGNAL", "SIGTERM"] in words
    assert 'ENTRYPOINT ["stator"]' in lines
    tmpfs = next(each for each in SERVICES["worker"]["tmpfs"] if each.startswith(environment("worker")["XDG_RUNTIME_DIR"]))
    assert "uid=65532" in tmpfs
    assert "mode=0700" in tmpfs


def test_the_page_names_every_file() -> None:
    page = (DEPLOY.parent / "docs" / "deploy.md").read_text("utf-8")
    for path in [*SYSTEMD.iterdir(), *(DEPLOY / "compose").iterdir()]:
        assert path.name in page, path.name
