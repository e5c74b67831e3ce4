"""The command line as a user runs it: a real process, what it prints, and the processes it starts."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from stator.settings import child_environment

__all__ = ["StatorProcess", "clean_environment", "run_stator", "running", "wait_gone"]

_URL = re.compile(r"ready: model .* at (http://\S+)/v1")


def clean_environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """The present environment without anybody's settings, and `changes`; a `PYTHONPATH` among them goes before the present one."""
    environment = {
        name: value for name, value in child_environment({}).items() if not name.startswith(("STATOR_", "DYN_", "OMP_"))
    }
    found = {**environment, "NO_COLOR": "1", "COLUMNS": "120", **(changes or {})}
    paths = [path for path in (found.get("PYTHONPATH"), environment.get("PYTHONPATH")) if path]
    return {**found, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))} if paths else found


def run_stator(
    *arguments: str, environment: Mapping[str, str] | None = None, timeout: float = 30.0
) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end; both outputs as text."""
    return subprocess.run(
        [sys.executable, "-m", "stator", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        env=clean_environment(environment),
        check=False,
    )


class StatorProcess:
    """`python -m stator …` (or another command) in the background. Leaving the block ends it and all it started, by their ids."""

    def __init__(
        self,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "stator"),
        directory: Path | None = None,
    ) -> None:
        self.lines: list[str] = []
        """what it has printed so far, on either output"""
        self._news = threading.Condition()
        self._descendants: dict[int, psutil.Process] = {}
        self.process = subprocess.Popen(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=clean_environment(environment),
            cwd=directory,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line.decode(errors="replace").rstrip())
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    # -- what it says

    @property
    def output(self) -> str:
        """All of it."""
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, *, timeout: float = 30.0, since: int = 0) -> re.Match[str]:
        """The first line from number `since` on that has `pattern`. AssertionError when it does not come."""
        deadline = time.monotonic() + timeout
        expression = re.compile(pattern)
        seen = since
        with self._news:
            while True:
                while seen < len(self.lines):
                    if found := expression.search(self.lines[seen]):
                        return found
                    seen += 1
                left = deadline - time.monotonic()
                if left <= 0 or not self._reader.is_alive():
                    raise AssertionError(f"no line has {pattern!r}; this was printed:\n" + "\n".join(self.lines))
                self._news.wait(min(left, 0.2))

    def wait_until_ready(self, *, workers: int = 1, timeout: float = 60.0) -> str:
        """Wait until a request was answered and `workers` workers serve; the URL without `/v1`."""
        url = self.wait_for(_URL.pattern, timeout=timeout).group(1)
        for number in range(1, workers + 1):
            self.wait_for(rf"worker {number}: ready", timeout=timeout)
        return url

    # -- its processes

    def children(self, role: str = "") -> list[int]:
        """Process ids of its children whose command is `role` (`worker`, `frontend`; all if empty), oldest first."""
        try:
            found = psutil.Process(self.process.pid).children()
        except psutil.NoSuchProcess:
            return []
        wanted: list[psutil.Process] = []
        for process in found:
            try:
                if not role or role in process.cmdline()[1:5]:
                    wanted.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        for process in wanted:
            self._descendants[process.pid] = process
        return [process.pid for process in sorted(wanted, key=lambda process: process.create_time())]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process itself."""
        self.process.send_signal(number)

    def wait(self, timeout: float = 15.0) -> int:
        """Its exit status. Also waits for its last words."""
        status = self.process.wait(timeout)
        self._reader.join(5.0)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.children()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(15.0)
            except subprocess.TimeoutExpired:
                pass
        for pid in [self.process.pid, *self._descendants]:
            if pid == self.process.pid and self.process.poll() is not None:
                continue
            if pid != self.process.pid and not self._descendants[pid].is_running():
                continue
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait(5.0)
        self._reader.join(5.0)
        if self.process.stdout is not None:
            self.process.stdout.close()


def running(pids: Sequence[int]) -> list[int]:
    """Those of `pids` that still run."""
    alive: list[int] = []
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                alive.append(pid)
        except psutil.NoSuchProcess:
            continue
    return alive


def wait_gone(pids: Sequence[int], *, timeout: float = 10.0) -> list[int]:
    """Wait until none of `pids` runs; those that are left."""
    deadline = time.monotonic() + timeout
    while (left := running(pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left
