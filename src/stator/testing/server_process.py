"""What servers of one's own have in common, whatever they serve: one process at a time, its log, and a way to make it stand still."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = ["ServerProcess"]

_START = 30.0
"""seconds until it must be ready"""
_STOP = 5.0
"""seconds until it must have ended"""
_STANDING = 10.0
"""seconds until all of its threads must stand still"""


class ServerProcess:
    """Base of a server: `launch` and end are here, what to launch and when it is ready are the server's own.

    Calls block; inside an event loop they belong in a thread.
    """

    def __init__(self, directory: Path, *, log: str) -> None:
        """`log` names a file in `directory`, to which each start appends."""
        self._directory = directory
        self._log = directory / log
        self._log_start = 0
        self._process: subprocess.Popen[bytes] | None = None

    def _launch(self, command: Sequence[str], *, env: Mapping[str, str] | None = None) -> None:
        """Start a process in the directory, which exists. `env` None is that of this process."""
        with self._log.open("ab") as log:
            self._log_start = log.tell()
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self._directory, env=env
            )

    def _wait_until(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()`. RuntimeError with its log, and no process left, when it ends before or takes too long."""
        deadline = time.monotonic() + _START
        while self._process is not None and self._process.poll() is None and time.monotonic() < deadline:
            if ready():
                return
            time.sleep(0.01)
        self.kill()
        raise RuntimeError(f"{type(self).__name__} did not start: {self.log()}")

    def stop(self) -> None:
        """SIGTERM, and SIGKILL when that does not help. Idempotent."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(_STOP)
            except subprocess.TimeoutExpired:
                pass
        self.kill()

    def kill(self) -> None:
        """SIGKILL. Idempotent."""
        process, self._process = self._process, None
        if process is not None:
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
        """A server that is there and does nothing, inside the block. RuntimeError when it goes on all the same."""
        pid = self.pid
        os.kill(pid, signal.SIGSTOP)
        try:
            deadline = time.monotonic() + _STANDING
            while (states := _states(pid)) != {"T"}:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the server does not stand still, its threads are {sorted(states)}")
                time.sleep(0.001)
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def log(self) -> str:
        """The end of what it wrote."""
        return self._log.read_text("utf-8", errors="replace")[-5000:]

    def written(self) -> bytes:
        """What it wrote since the last start."""
        return self._log.read_bytes()[self._log_start :]


def _states(pid: int) -> set[str]:
    """Of its threads, as the kernel names them; each stops when it is next looked at."""
    return {(task / "stat").read_text("utf-8").rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()}
