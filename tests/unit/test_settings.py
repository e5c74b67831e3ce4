"""Settings: which source wins, what malformed values and unknown names do, and what is found in the environment."""

import importlib.util
import io
import logging
import os
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest

from stator.config import Config, Secret, Setting
from stator.errors import ConfigError
from stator.settings import check_names, child_environment, describe, device_type, load, pod_ip, user_root, wants_color

ROOT = Path(__file__).resolve().parents[2]


def read_plane(text: str) -> str:
    if text.lower() not in ("tcp", "nats"):
        raise ValueError(f"Invalid request plane mode: {text!r}. Valid options are: 'nats', 'tcp'")
    return text.lower()


class Demo(Config, frozen=True, kw_only=True):
    section = "demo"
    host: Annotated[str | None, Setting(doc="bind address", dyn=("DYN_TCP_RPC_HOST", "DYN_OLD_HOST"))] = None
    port: Annotated[int, Setting(doc="port; 0: any", dyn="DYN_TCP_RPC_PORT", ge=0, le=65535)] = 0
    codec: Annotated[Literal["json", "msgpack"], Setting(doc="codec", dyn="DYN_REQUEST_PLANE_CODEC")] = "json"
    plane: Annotated[
        Literal["tcp", "nats"],
        Setting(doc="plane", dyn="DYN_REQUEST_PLANE", dyn_read=read_plane, on_bad_dyn="error", dyn_empty="value"),
    ] = "tcp"
    canary: Annotated[bool, Setting(doc="canary", dyn="DYN_HEALTH_CHECK_ENABLED")] = False
    names: Annotated[tuple[str, ...], Setting(doc="names", dyn="DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS")] = ()
    lora: Annotated[bool, Setting(doc="lora", dyn="DYN_SELF_HOST_METADATA")] = False
    size: Annotated[int, Setting(doc="size", unit="bytes", dyn="DYN_TCP_MAX_MESSAGE_SIZE", ge=1)] = 32 * 2**20
    wait: Annotated[float | None, Setting(doc="wait", unit="s", gt=0)] = 3.0
    secret: Annotated[Secret | None, Setting(doc="secret")] = None


class Top(Config, frozen=True, kw_only=True):
    plane: Annotated[Literal["auto", "native"], Setting(doc="plane")] = "auto"


class Required(Config, frozen=True, kw_only=True):
    section = "demo"
    model: Annotated[str, Setting(doc="the model")]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_first_source_that_has_a_value_wins(tmp_path: Path) -> None:
    env = {
        "STATOR_CONFIG": write(tmp_path / "c.toml", "plane = 'native'\n[demo]\nport = 4\nsize = '1KiB'\nwait = 5\nhost = 'f'\n")
    }
    assert load(Demo, env={}).port == 0
    loaded = load(Demo, env=env)
    assert (loaded.port, loaded.size, loaded.wait, loaded.host) == (4, 1024, 5, "f")
    assert load(Top, env=env).plane == "native"
    env["DYN_TCP_RPC_PORT"] = "3"
    assert load(Demo, env=env).port == 3
    env["STATOR_DEMO_PORT"] = "2"
    assert load(Demo, env=env).port == 2
    assert load(Demo, {"port": 1}, env=env).port == 1
    assert load(Demo, {"port": "1"}, env=env).port == 1


def test_none_as_argument_is_a_value_only_where_the_field_allows_it() -> None:
    loaded = load(Demo, {"wait": None, "port": None}, env={"STATOR_DEMO_WAIT": "7", "STATOR_DEMO_PORT": "9"})
    assert (loaded.wait, loaded.port) == (None, 9)


def test_empty_variables_count_as_unset() -> None:
    loaded = load(Demo, env={"STATOR_DEMO_PORT": "", "DYN_TCP_RPC_PORT": "", "DYN_TCP_RPC_HOST": "", "DYN_OLD_HOST": "h"})
    assert (loaded.port, loaded.host) == (0, "h")


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"STATOR_DEMO_PORT": "http"}, "STATOR_DEMO_PORT='http': expected a whole number from 0 to 65535"),
        ({"STATOR_DEMO_PORT": "70000"}, "STATOR_DEMO_PORT='70000': expected a whole number from 0 to 65535"),
        ({"STATOR_DEMO_WAIT": "-1"}, "STATOR_DEMO_WAIT='-1': expected a number of seconds > 0, or none"),
        ({"STATOR_DEMO_CODEC": "xml"}, "STATOR_DEMO_CODEC='xml': expected one of json, msgpack"),
        ({"STATOR_DEMO_CANARY": "maybe"}, "STATOR_DEMO_CANARY='maybe': expected true or false"),
        ({"STATOR_DEMO_SIZE": "9 cm"}, "STATOR_DEMO_SIZE='9 cm': expected a whole number of bytes ≥ 1"),
        (
            {"DYN_REQUEST_PLANE": "http"},
            "DYN_REQUEST_PLANE='http': Invalid request plane mode: 'http'. Valid options are: 'nats', 'tcp'",
        ),
        ({"DYN_REQUEST_PLANE": ""}, "DYN_REQUEST_PLANE='': Invalid request plane mode: ''. Valid options are: 'nats', 'tcp'"),
        ({"DYN_HEALTH_CHECK_ENABLED": "1"}, "DYN_HEALTH_CHECK_ENABLED='1': expected true or false"),
        ({"DYN_HEALTH_CHECK_ENABLED": "True"}, "DYN_HEALTH_CHECK_ENABLED='True': expected true or false"),
        (
            {"DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": "generate"},
            "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS='generate': expected a comma-separated list, each a text",
        ),
    ],
)
def test_malformed_values_name_variable_value_and_expectation(env: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Demo, env=env)
    assert str(caught.value) == text


def test_bad_values_the_reference_lives_with_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    env = {"DYN_TCP_RPC_PORT": "any", "DYN_REQUEST_PLANE_CODEC": "JSON", "DYN_TCP_MAX_MESSAGE_SIZE": "32MiB"}
    with caplog.at_level(logging.WARNING):
        loaded = load(Demo, env=env)
    assert (loaded.port, loaded.codec, loaded.size) == (0, "json", 32 * 2**20)
    assert "DYN_REQUEST_PLANE_CODEC='JSON' is ignored: expected one of json, msgpack" in caplog.messages
    assert len(caplog.messages) == 3


def test_the_references_spellings_are_read() -> None:
    env = {
        "DYN_REQUEST_PLANE": "NATS",
        "DYN_HEALTH_CHECK_ENABLED": "true",
        "DYN_SYSTEM_USE_ENDPOINT_HEALTH_STATUS": '["a","b"]',
        "DYN_SELF_HOST_METADATA": "On",
        "DYN_UNKNOWN": "ignored",
    }
    loaded = load(Demo, env=env)
    assert (loaded.plane, loaded.canary, loaded.names, loaded.lora) == ("nats", True, ("a", "b"), True)


def test_a_bad_reference_value_does_not_matter_when_ours_is_set() -> None:
    assert load(Demo, env={"DYN_REQUEST_PLANE": "http", "STATOR_DEMO_PLANE": "tcp"}).plane == "tcp"


def test_unknown_and_malformed_arguments_are_refused() -> None:
    with pytest.raises(ConfigError, match="Demo has no setting 'prot'; did you mean 'port'"):
        load(Demo, {"prot": 1}, env={})
    with pytest.raises(ConfigError, match="argument port=-1: expected a whole number from 0 to 65535"):
        load(Demo, {"port": -1}, env={})


def test_a_required_setting_says_so() -> None:
    with pytest.raises(ConfigError, match="STATOR_DEMO_MODEL is not set: the model; expected a text"):
        load(Required, env={})
    assert load(Required, env={"STATOR_DEMO_MODEL": "m"}).model == "m"


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[demo]\nport = 'x'\n", "c.toml: demo.port='x': expected a whole number from 0 to 65535"),
        ("[demo]\nnames = [1]\n", "c.toml: demo.names=[1]: expected a comma-separated list, each a text"),
        ("demo = 3\n", "where a table [demo] is expected"),
        ("[demo\n", "is not TOML"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(Demo, env={"STATOR_CONFIG": write(tmp_path / "c.toml", content)})
    assert text in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"STATOR_CONFIG='.*nope.toml' cannot be read: No such file"):
        load(Demo, env={"STATOR_CONFIG": str(tmp_path / "nope.toml")})


def test_lists_in_the_file_are_lists(tmp_path: Path) -> None:
    assert load(Demo, env={"STATOR_CONFIG": write(tmp_path / "c.toml", "[demo]\nnames = ['a', 'b']\n")}).names == ("a", "b")


def test_secrets_come_from_variable_file_or_toml(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", "swordfish\n")
    toml = write(tmp_path / "c.toml", f"[demo]\nsecret_file = '{path}'\n")
    for env in ({"STATOR_DEMO_SECRET": "swordfish"}, {"STATOR_DEMO_SECRET_FILE": path}, {"STATOR_CONFIG": toml}):
        assert load(Demo, env=env).secret == Secret("swordfish")
    assert load(Demo, {"secret": "swordfish"}, env={}).secret == Secret("swordfish")


@pytest.mark.parametrize("content", [None, " \n"])
def test_secret_files_must_hold_something(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=r"STATOR_DEMO_SECRET_FILE='.*secret'"):
        load(Demo, env={"STATOR_DEMO_SECRET_FILE": str(path)})


def test_two_secrets_are_a_contradiction_that_shows_neither(tmp_path: Path) -> None:
    env = {"STATOR_DEMO_SECRET": "swordfish", "STATOR_DEMO_SECRET_FILE": write(tmp_path / "secret", "marlin")}
    with pytest.raises(ConfigError, match="are both set") as caught:
        load(Demo, env=env)
    assert "swordfish" not in str(caught.value) and "marlin" not in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest(tmp_path: Path) -> None:
    check_names(
        [Demo, Top], {"STATOR_DEMO_PORT": "1", "STATOR_DEMO_SECRET_FILE": "x", "STATOR_PLANE": "auto", "DYN_NONSENSE": "1"}
    )
    with pytest.raises(ConfigError, match="'STATOR_DEMO_PROT'; did you mean 'STATOR_DEMO_PORT'"):
        check_names([Demo], {"STATOR_DEMO_PROT": "1"})
    with pytest.raises(ConfigError, match=r"no setting is called 'STATOR_QQQQQQQQ'$"):
        check_names([], {"STATOR_QQQQQQQQ": "1"})
    for content, message in (("[demo]\nprot = 1\n", "did you mean 'demo.port'"), ("plain = 'auto'\n", "did you mean 'plane'")):
        with pytest.raises(ConfigError, match=message):
            check_names([Demo, Top], {"STATOR_CONFIG": write(tmp_path / "c.toml", content)})


def test_names_of_rooms_that_are_not_imported_are_known() -> None:
    keys = (ROOT / "src/stator/known_settings.txt").read_text().split()
    check_names([], {"STATOR_" + key.replace(".", "_").upper(): "x" for key in keys})


def test_what_kubernetes_says_of_a_service_called_stator_is_no_setting() -> None:
    links = {
        "STATOR_SERVICE_HOST": "10.0.0.1",
        "STATOR_DEMO_SERVICE_PORT": "80",
        "STATOR_DEMO_SERVICE_PORT_HTTP": "80",
        "STATOR_DEMO_PORT": "tcp://10.0.0.1:80",
        "STATOR_DEMO_PORT_80_TCP": "tcp://10.0.0.1:80",
        "STATOR_DEMO_PORT_80_TCP_ADDR": "10.0.0.1",
        "STATOR_OTHER_PORT": "tcp://10.0.0.2:80",
    }
    check_names([Demo], links)
    assert load(Demo, env=links).port == 0


def test_describe_shows_what_a_reader_needs() -> None:
    rows = {row.variable: row for row in describe(Demo)}
    size = rows["STATOR_DEMO_SIZE"]
    assert (size.key, size.default, size.dyn, size.expects) == (
        "demo.size",
        "32 MiB",
        ("DYN_TCP_MAX_MESSAGE_SIZE",),
        "a whole number of bytes ≥ 1",
    )
    assert (rows["STATOR_DEMO_HOST"].default, rows["STATOR_DEMO_CANARY"].default, rows["STATOR_DEMO_WAIT"].default) == (
        "none",
        "false",
        "3",
    )
    assert describe(Required)[0].default == "(required)"


def settings_page() -> ModuleType:
    spec = importlib.util.spec_from_file_location("settings_page", ROOT / "docs" / "settings_page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_settings_page_is_current() -> None:
    module: Any = settings_page()
    assert module.main(["--check"]) == 0, "run python docs/settings_page.py"


def test_every_reference_variable_is_named_by_one_kind_of_setting() -> None:
    module: Any = settings_page()
    text = module.page([Demo])
    assert "| `STATOR_DEMO_PORT` | `0` | a whole number from 0 to 65535 | port; 0: any | `DYN_TCP_RPC_PORT` |" in text


@pytest.mark.parametrize(
    ("env", "device"),
    [
        ({}, "cuda"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": " -1 "}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "None"}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "void"}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "NVIDIA_VISIBLE_DEVICES": "void"}, "cpu"),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, "cuda"),
        ({"NVIDIA_VISIBLE_DEVICES": "none"}, "cpu"),
        ({"NVIDIA_VISIBLE_DEVICES": ""}, "cuda"),
        ({"NVIDIA_VISIBLE_DEVICES": "-1"}, "cuda"),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, "cuda"),
    ],
)
def test_device_type_follows_the_visibility_variables(env: dict[str, str], device: str) -> None:
    assert device_type(env) == device


def test_pod_ip() -> None:
    assert pod_ip({"POD_IP": "10.1.2.3"}) == "10.1.2.3"
    assert pod_ip({"POD_IP": ""}) is None and pod_ip({}) is None


def test_the_user_root_is_private_and_the_first_that_can_be_had(tmp_path: Path) -> None:
    run, home, temp = tmp_path / "run", tmp_path / "home", tmp_path / "temp"
    for path in (run, home, temp):
        path.mkdir()
    env = {"XDG_RUNTIME_DIR": str(run), "HOME": str(home), "TMPDIR": str(temp)}
    root = user_root(env)
    assert root == run / "stator" and root.stat().st_mode & 0o777 == 0o700
    root.chmod(0o755)
    assert user_root(env).stat().st_mode & 0o777 == 0o700
    root.rmdir()
    root.symlink_to(temp)
    assert user_root(env) == home / ".cache" / "stator"
    assert user_root({"TMPDIR": str(temp)}) == temp / f"stator-{os.getuid()}"


def test_no_private_directory_is_an_error_that_says_why(tmp_path: Path) -> None:
    (tmp_path / f"stator-{os.getuid()}").write_text("in the way")
    with pytest.raises(ConfigError, match=r"set XDG_RUNTIME_DIR to one of yours .*not a directory of ours"):
        user_root({"TMPDIR": str(tmp_path)})


def test_color_is_for_terminals_unless_somebody_says_otherwise() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert wants_color(Terminal(), {}) is True
    assert wants_color(io.StringIO(), {}) is False
    assert wants_color(io.StringIO(), {"FORCE_COLOR": "1"}) is True
    for env in ({"NO_COLOR": "1"}, {"TERM": "dumb"}, {"DYN_SDK_DISABLE_ANSI_LOGGING": "1"}):
        assert wants_color(Terminal(), env) is False


def test_a_childs_environment_is_ours_with_changes() -> None:
    assert child_environment({"A": "2", "B": None, "C": "3"}, {"A": "1", "B": "1", "D": "4"}) == {"A": "2", "C": "3", "D": "4"}
