"""The part of kubeconfig files that is understood: a server, its CA, and a token or a client certificate."""

import base64
import binascii
import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec

from stator.config import Secret
from stator.errors import ConfigError

__all__ = ["Access", "Material", "read_kubeconfig"]

Table = dict[str, Any]


class Material(msgspec.Struct, frozen=True, kw_only=True):
    """A certificate, a key or a token: in a file that may change, or as it is."""

    file: Path | None = None
    text: Secret = Secret("")

    def __bool__(self) -> bool:
        return self.file is not None or bool(self.text)


class Access(msgspec.Struct, frozen=True, kw_only=True):
    """Where the API server is, and what proves who is who. Nothing of it shows secrets."""

    server: str
    ca: Material = Material()
    certificate: Material = Material()
    key: Material = Material()
    token: Material = Material()
    server_name: str = ""
    """what the server's certificate must name; empty: the host of `server`"""
    namespace: str = ""


def read_kubeconfig(paths: Iterable[Path]) -> Access:
    """The current context of these files; of what several define, the first wins. Raises `ConfigError` saying what to do."""
    merged: dict[str, dict[str, tuple[Table, Path]]] = {"clusters": {}, "users": {}, "contexts": {}}
    current = ""
    where = ""
    for path in paths:
        config = _load(path)
        where = where or str(path)
        current = current or str(config.get("current-context") or "")
        for kind, found in merged.items():
            for name, entry in _named(config, kind, path):
                found.setdefault(name, (entry, path))
    if not current:
        raise ConfigError(f"kubeconfig {where!r} has no current-context; choose one with `kubectl config use-context NAME`")
    context, _ = _of(merged, "contexts", "context", current, where)
    cluster, cluster_path = _of(merged, "clusters", "cluster", str(context.get("cluster") or ""), where)
    user_name = str(context.get("user") or "")
    user, user_path = _of(merged, "users", "user", user_name, where) if user_name else ({}, Path(where))
    _refuse(cluster, user, user_name, where)
    server = str(cluster.get("server") or "")
    if not server.startswith(("https://", "http://")):
        raise ConfigError(f"kubeconfig {where!r}: the cluster of context {current!r} has no server URL, but {server!r}")
    return Access(
        server=server.rstrip("/"),
        ca=_material(cluster, "certificate-authority", cluster_path),
        certificate=_material(user, "client-certificate", user_path),
        key=_material(user, "client-key", user_path),
        token=_token(user, user_path),
        server_name=str(cluster.get("tls-server-name") or ""),
        namespace=str(context.get("namespace") or ""),
    )


def _load(path: Path) -> Table:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"kubeconfig {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        config: Any = msgspec.json.decode(data)
    except (msgspec.DecodeError, ValueError):
        config = _load_yaml(path, data)
    if not isinstance(config, dict):
        raise ConfigError(f"kubeconfig {str(path)!r} is no table of clusters, users and contexts")
    return cast(Table, config)


def _load_yaml(path: Path, data: bytes) -> object:
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError as error:
        raise ConfigError(
            f"kubeconfig {str(path)!r} is YAML, for which PyYAML is needed: pip install pyyaml "
            "(or make it JSON: kubectl config view --raw --flatten -o json)"
        ) from error
    try:
        return yaml.safe_load(data)
    except yaml.YAMLError as error:
        # the text of the error quotes the file, which may hold secrets
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise ConfigError(f"kubeconfig {str(path)!r} is neither JSON nor YAML (line {line})") from None


def _named(config: Table, kind: str, path: Path) -> Iterable[tuple[str, Table]]:
    entries: Any = config.get(kind) or []
    if not isinstance(entries, list):
        raise ConfigError(f"kubeconfig {str(path)!r}: {kind} is no list")
    for entry in cast("list[object]", entries):
        if isinstance(entry, dict):
            table = cast(Table, entry)
            content: Any = table.get(kind.removesuffix("s")) or {}
            if isinstance(content, dict):
                yield str(table.get("name") or ""), cast(Table, content)


def _of(merged: "dict[str, dict[str, tuple[Table, Path]]]", kind: str, what: str, name: str, where: str) -> tuple[Table, Path]:
    found = merged[kind].get(name)
    if found is None:
        raise ConfigError(f"kubeconfig {where!r} has no {what} called {name!r}; it has {', '.join(merged[kind]) or 'none'}")
    return found


def _refuse(cluster: Table, user: Table, name: str, where: str) -> None:
    """Raise for what would be needed and is not understood."""
    if cluster.get("insecure-skip-tls-verify"):
        raise ConfigError(
            f"kubeconfig {where!r} wants insecure-skip-tls-verify, which is refused: give the server's certificate-authority"
        )
    for helper in ("exec", "auth-provider"):
        if user.get(helper):
            raise ConfigError(
                f"kubeconfig {where!r}: user {name!r} gets credentials from a helper program ({helper}), which is not run here. "
                "Give the user a token instead: kubectl create token SERVICE_ACCOUNT --duration 24h"
            )
    for table, name in ((cluster, "proxy-url"), (user, "as")):
        if table.get(name):
            raise ConfigError(f"kubeconfig {where!r} has {name}, which is not understood here; use one that does without")
    if user.get("username") or user.get("password"):
        raise ConfigError(
            f"kubeconfig {where!r}: user {name!r} has a password, which API servers take no more; give it a token"
        )


def _material(table: Table, name: str, path: Path) -> Material:
    """The value of `name` or `name-data`; the latter wins, as with kubectl."""
    data = table.get(f"{name}-data")
    if data:
        try:
            return Material(text=Secret(base64.b64decode(str(data), validate=True).decode("ascii")))
        except (binascii.Error, ValueError):
            raise ConfigError(f"kubeconfig {str(path)!r}: {name}-data is not PEM in base64") from None
    file = table.get(name)
    return Material(file=path.parent / str(file)) if file else Material()


def _token(user: Table, path: Path) -> Material:
    if user.get("tokenFile"):
        return Material(file=path.parent / str(user["tokenFile"]))
    return Material(text=Secret(str(user["token"]).strip())) if user.get("token") else Material()
