"""Where values come from: the only reader of environment, files and flags. It knows no room.

For each field of a config struct the first source that has it wins:

    arguments  >  STATOR_*  >  DYN_* (the reference's names)  >  the file named by STATOR_CONFIG  >  the default

Ours are strict: a malformed `STATOR_*` value and an unknown `STATOR_*` name are errors. The reference's are read as it reads
them (`spec/10 §1.7`, `spec/25 §1`): a bad value is an error where it aborts and a warning where it goes on, unknown names are
ignored. An empty variable counts as unset. What else depends on the environment (directories, devices, colours) is found here.
"""

import difflib
import logging
import os
import re
import stat
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TextIO, TypeVar, cast

import msgspec

from stator.config import Config, Field, Secret, fields_of, parse_text
from stator.errors import ConfigError

__all__ = [
    "SettingRow",
    "check_names",
    "child_environment",
    "describe",
    "device_type",
    "load",
    "personal_kubeconfig",
    "pod_ip",
    "user_root",
    "wants_color",
]

log = logging.getLogger(__name__)

C = TypeVar("C", bound=Config)
Environment = Mapping[str, str]

CONFIG_VARIABLE = "STATOR_CONFIG"
# The blocks of variables that the reference validates as a whole and whose errors abort it (spec/25 §1.1).
_BLOCKS = ("DYN_RUNTIME_", "DYN_SYSTEM_", "DYN_COMPUTE_", "DYN_HEALTH_CHECK_", "DYN_CANARY_")
# The keys of all settings in the package, so that a worker knows a frontend's. Written by docs/settings_page.py.
_SHIPPED_KEYS = frozenset(Path(__file__).with_name("known_settings.txt").read_text("utf-8").split())
# Kubernetes announces each service to all pods; one called "stator" or "stator-frontend" must not look like our settings.
_SERVICE_LINK = re.compile(r"STATOR\w*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")
_SERVICE_URL = re.compile(r"(tcp|udp|sctp)://")


def load(config: type[C], overrides: Mapping[str, Any] | None = None, *, env: Environment | None = None) -> C:
    """Build a `config` from all sources. `overrides` are the arguments, by field name.

    A text among them is read like a variable's value; None counts as not given where the field cannot be None.
    Raises `ConfigError` naming the variable, key or argument, its value and what was expected.
    """
    env = os.environ if env is None else env
    arguments = dict(overrides or {})
    fields = fields_of(config)
    if unknown := sorted(arguments.keys() - {field.name for field in fields}):
        raise ConfigError(f"{config.__name__} has no setting {_suggest(unknown[0], [field.name for field in fields])}")
    table = _table(_read_file(env), config.section)
    values: dict[str, Any] = {}
    for field in fields:
        value = _first(field, arguments, env, table)
        if value is not msgspec.UNSET:
            values[field.name] = value
        elif field.default is msgspec.NODEFAULT:
            raise ConfigError(f"{field.variable} is not set: {field.setting.doc}; expected {field.expectation()}")
    return config(**values)


def check_names(known: Iterable[type[Config]] = (), env: Environment | None = None) -> None:
    """Refuse `STATOR_*` variables and keys of the file that no setting has; the nearest name is in the `ConfigError`.

    The settings of Stator itself are always known, whether their rooms are imported or not; `known` adds those of plug-ins.
    """
    env = os.environ if env is None else env
    keys = set(_SHIPPED_KEYS)
    for config in known:
        for field in fields_of(config):
            keys.update(field.keys)
    variables = {CONFIG_VARIABLE, *("STATOR_" + key.replace(".", "_").upper() for key in keys)}
    for name in sorted(env):
        if name.startswith("STATOR_") and name not in variables and not _is_service_link(name, env[name]):
            raise ConfigError(f"no setting is called {_suggest(name, variables, prefix='STATOR_')}")
    for key in _flatten(_read_file(env)):
        if key not in keys:
            raise ConfigError(f"{env[CONFIG_VARIABLE]}: no setting is called {_suggest(key, keys)}")


class SettingRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the settings page."""

    variable: str
    key: str
    dyn: tuple[str, ...]
    default: str
    expects: str
    doc: str


def describe(config: type[Config]) -> list[SettingRow]:
    """The settings of `config` for people, in order of declaration."""
    return [
        SettingRow(
            variable=field.variable,
            key=field.key,
            dyn=field.setting.dyn_names,
            default=_show_default(field),
            expects=field.expectation(),
            doc=field.setting.doc,
        )
        for field in fields_of(config)
    ]


def user_root(env: Environment | None = None) -> Path:
    """Stator's directory of this user on this machine: exists, is ours, mode 0700. Base of file discovery and Unix sockets.

    `$XDG_RUNTIME_DIR/stator`, else `~/.cache/stator`, else `$TMPDIR/stator-<uid>`; the first that can be had.
    Raises `ConfigError` when none can.
    """
    env = os.environ if env is None else env
    candidates = [
        Path(env[name], *rest) for name, *rest in (("XDG_RUNTIME_DIR", "stator"), ("HOME", ".cache", "stator")) if env.get(name)
    ]
    candidates.append(Path(env.get("TMPDIR") or "/tmp", f"stator-{os.getuid()}"))
    problems: list[str] = []
    for path in candidates:
        try:
            _make_private(path)
            return path
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    raise ConfigError("no private directory can be made; set XDG_RUNTIME_DIR to one of yours (" + "; ".join(problems) + ")")


def device_type(env: Environment | None = None) -> Literal["cpu", "cuda"]:
    """What a worker says it runs on, decided from the environment alone (`spec/20 §2.3`)."""
    env = os.environ if env is None else env
    if env.get("CUDA_VISIBLE_DEVICES", "all").strip().lower() in ("", "-1", "none", "void"):
        return "cpu"
    return "cpu" if env.get("NVIDIA_VISIBLE_DEVICES", "").strip().lower() in ("none", "void") else "cuda"


def pod_ip(env: Environment | None = None) -> str | None:
    """The address Kubernetes gave the pod (downward API), the best one to advertise; None outside a pod."""
    env = os.environ if env is None else env
    return env.get("POD_IP", "").strip() or None


def personal_kubeconfig(env: Environment | None = None) -> Path | None:
    """`~/.kube/config`, where kubectl of this user has its clusters; None if there is none."""
    env = os.environ if env is None else env
    path = Path(env["HOME"], ".kube", "config") if env.get("HOME") else None
    return path if path is not None and path.is_file() else None


def wants_color(stream: TextIO, env: Environment | None = None) -> bool:
    """Whether text written to `stream` should be coloured: a terminal, and nobody said no."""
    env = os.environ if env is None else env
    if env.get("NO_COLOR") or env.get("DYN_SDK_DISABLE_ANSI_LOGGING", "").lower() in ("1", "true", "on", "yes"):
        return False
    if env.get("FORCE_COLOR", "0") != "0":
        return True
    return env.get("TERM") != "dumb" and stream.isatty()


def child_environment(changes: Mapping[str, str | None], env: Environment | None = None) -> dict[str, str]:
    """The environment of a child process: ours with `changes`; None removes a variable."""
    merged = dict(os.environ if env is None else env)
    for name, value in changes.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = value
    return merged


def _first(field: Field, arguments: Mapping[str, Any], env: Environment, table: Mapping[str, Any]) -> object:
    """The value of the first source that has one, checked; UNSET if none has."""
    argument = arguments.get(field.name, msgspec.UNSET)
    if argument is not msgspec.UNSET and (argument is not None or field.optional):
        return _given(field, f"argument {field.name}", argument)
    for read in (_from_variable, _from_dyn):
        found = read(field, env)
        if found is not msgspec.UNSET:
            return found
    if field.kind == "secret" and f"{field.name}_file" in table:
        return _given(field, field.key, _read_secret(f"{field.key}_file", str(table[f"{field.name}_file"])))
    if field.name in table:
        return _given(field, f"{env[CONFIG_VARIABLE]}: {field.key}", table[field.name])
    return msgspec.UNSET


def _from_variable(field: Field, env: Environment) -> object:
    name = field.variable
    text = env.get(name, "")
    if _is_service_link(name, text):
        text = ""
    if field.kind == "secret" and (file := env.get(f"{name}_FILE")):
        if text:
            raise ConfigError(f"{name} and {name}_FILE are both set; remove one")
        return _given(field, f"{name}_FILE", _read_secret(f"{name}_FILE", file))
    return _given(field, name, text) if text else msgspec.UNSET


def _given(field: Field, source: str, value: object) -> object:
    """`value` in the field's type, texts and lists converted. `ConfigError` naming `source` if it does not fit."""
    try:
        converted = _convert(field, value)
        problem = field.problem(converted)
    except ValueError:
        converted, problem = value, f"expected {field.expectation()}"
    if problem:
        raise ConfigError(f"{source}={field.shown(value)}: {problem}")
    return converted


def _convert(field: Field, value: object) -> object:
    if isinstance(value, str):
        return parse_text(field, value)
    if field.many and isinstance(value, list | tuple):
        single = msgspec.structs.replace(field, many=False, optional=False)
        return tuple(_convert(single, element) for element in cast("list[object]", value))
    return value


def _from_dyn(field: Field, env: Environment) -> object:
    """The value of the first of the reference's variables that has a usable one."""
    for name in field.setting.dyn_names:
        text = env.get(name)
        if text is None or (not text and field.setting.dyn_empty == "unset"):
            continue
        problem = ""
        value: object = None
        try:
            value = _read_dyn(field, name, text)
            problem = field.problem(value)
        except ValueError as error:
            problem = str(error) if field.setting.dyn_read else f"expected {field.expectation()}"
        if not problem:
            return value
        policy = field.setting.on_bad_dyn
        if policy == "error" or (policy == "reference" and name.startswith(_BLOCKS)):
            raise ConfigError(f"{name}={field.shown(text)}: {problem}")
        log.warning("%s=%s is ignored: %s", name, field.shown(text), problem)
    return msgspec.UNSET


def _read_dyn(field: Field, name: str, text: str) -> object:
    if field.setting.dyn_read is not None:
        return field.setting.dyn_read(text)
    if name.startswith(_BLOCKS):
        if field.kind == "bool" and text not in ("true", "false"):
            raise ValueError
        if field.many:
            value: object = tomllib.loads(f"value = {text}")["value"]
            return tuple(cast("list[object]", value)) if isinstance(value, list) else value
    return parse_text(field, text, plain=True)


def _read_secret(source: str, path: str) -> Secret:
    try:
        text = Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}={path!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not text:
        raise ConfigError(f"{source}={path!r} is empty; it should hold the secret")
    return Secret(text)


def _read_file(env: Environment) -> dict[str, Any]:
    path = env.get(CONFIG_VARIABLE)
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{CONFIG_VARIABLE}={path!r} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{CONFIG_VARIABLE}={path!r} is not TOML: {error}") from error


def _table(file: dict[str, Any], section: str) -> dict[str, Any]:
    table = file.get(section, {}) if section else file
    if not isinstance(table, dict):
        raise ConfigError(f"the file of {CONFIG_VARIABLE} has a value called {section!r} where a table [{section}] is expected")
    return cast("dict[str, Any]", table)


def _flatten(file: dict[str, Any]) -> list[str]:
    """Keys as `Field.key` has them."""
    keys: list[str] = []
    for name, value in file.items():
        if isinstance(value, dict):
            keys.extend(f"{name}.{key}" for key in cast("dict[str, object]", value))
        else:
            keys.append(name)
    return keys


def _is_service_link(name: str, value: str) -> bool:
    return _SERVICE_LINK.fullmatch(name) is not None or (name.endswith("_PORT") and _SERVICE_URL.match(value) is not None)


def _suggest(name: str, names: Iterable[str], *, prefix: str = "") -> str:
    """`name` quoted, with the nearest of `names` if there is one; what all have in common makes none near."""
    near = difflib.get_close_matches(name.removeprefix(prefix), sorted(known.removeprefix(prefix) for known in names), n=1)
    return f"{name!r}; did you mean {prefix + near[0]!r}?" if near else f"{name!r}"


def _show_default(field: Field) -> str:
    value: Any = field.default
    if value is msgspec.NODEFAULT:
        return "(required)"
    if value is None or field.kind == "secret":
        return "none"
    if field.many:
        return ",".join(map(str, value)) or "(empty)"
    if field.kind in ("int", "float"):
        return field.number(value)
    return str(value).lower() if field.kind == "bool" else str(value) or "(empty)"


def _make_private(path: Path) -> None:
    """Make `path` a directory that only we can enter; `OSError` if it is somebody else's or no directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(0, "exists and is not a directory of ours")
    if stat.S_IMODE(found.st_mode) & 0o077:
        path.chmod(0o700)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(0, "is not writable")
