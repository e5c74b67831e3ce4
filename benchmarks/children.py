"""Child processes of a benchmark: each in a process group of its own, asked by lines of JSON, stopped by id."""

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["ROOT", "Child", "ChildFailed", "child_environment", "free_port", "group_cpu_seconds", "resident_bytes"]

ROOT = Path(__file__).resolve().parent.parent
"""The checkout: where the package `benchmarks` and the references' environments are."""

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_STOP_GRACE = 5.0


class ChildFailed(Exception):
    """A child did not start, ended, answered with an error or did not answer in time. The text has no machine paths."""


class Child:
    """One process of a contender. A context manager: leaving it ends the process and everything left in its group.

    The child writes one JSON object per line to stdout; other lines are skipped. stderr goes to `directory/<name>.log`.
    """

    def __init__(
        self, name: str, command: Sequence[str], *, environment: Mapping[str, str], directory: Path, asked: bool = False
    ) -> None:
        self.name = name
        self._directory = directory
        self._log = directory / f"{name}.log"
        self._buffer = b""
        with self._log.open("wb") as log:
            try:
                self._process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=dict(environment),
                    stdin=subprocess.PIPE if asked else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
            except OSError as error:
                raise ChildFailed(f"{name} could not be started: {error.strerror}") from error

    @property
    def pid(self) -> int:
        """Process id; also the id of the group."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def check_alive(self) -> None:
        """Raise `ChildFailed` with the last line of the log if the process ended. It is not reaped before `stop`."""
        if (ended := self._ended()) is not None:
            how = "with code" if ended.si_code == os.CLD_EXITED else "by signal"
            raise ChildFailed(f"{self.name} ended {how} {ended.si_status}: {self._last_words()}")

    def ask(self, order: Mapping[str, Any], *, within: float) -> dict[str, Any]:
        """Send an order, wait at most `within` seconds for its answer; an answer with an `error` raises `ChildFailed`."""
        assert self._process.stdin is not None, "the child was started without asked=True"
        try:
            self._process.stdin.write(json.dumps(order).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._gone() from error
        answer = self.read(within=within)
        if "error" in answer:
            raise ChildFailed(f"{self.name}: {self._without_paths(str(answer['error']))}")
        return answer

    def read(self, *, within: float) -> dict[str, Any]:
        """The next JSON object the child writes, waiting at most `within` seconds."""
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        until = time.monotonic() + within
        while True:
            line, found, rest = self._buffer.partition(b"\n")
            if found:
                self._buffer = rest
                if (answer := _json_object(line)) is not None:
                    return answer
                continue
            ready, _, _ = select.select([descriptor], [], [], max(0.0, until - time.monotonic()))
            if not ready:
                raise ChildFailed(f"{self.name} did not answer within {within:g} s: {self._last_words()}")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                raise self._gone()
            self._buffer += chunk

    def stop(self) -> None:
        """End the process: SIGTERM, after 5 s SIGKILL, and SIGKILL for what is left of its group. Idempotent."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        if self._process.returncode is None:
            self._signal(signal.SIGTERM)
            self._await_end()
            # The leader is not reaped yet, so the id of the group cannot belong to anybody else.
            self._signal(signal.SIGKILL)
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _ended(self) -> os.waitid_result | None:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)

    def _await_end(self) -> None:
        until = time.monotonic() + _STOP_GRACE
        while self._ended() is None and time.monotonic() < until:
            time.sleep(0.01)

    def _gone(self) -> ChildFailed:
        """The child closed its pipes: say how it ended."""
        self._await_end()
        try:
            self.check_alive()
        except ChildFailed as failure:
            return failure
        return ChildFailed(f"{self.name} closed its pipes and lives on: {self._last_words()}")

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            pass

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return self._without_paths(lines[-1].strip()[:300]) if lines else "it wrote nothing to stderr"

    def _without_paths(self, text: str) -> str:
        return text.replace(str(self._directory), "<temporary>").replace(f"{ROOT}/", "").replace(str(ROOT), ".")


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without settings of any contender, with the checkout importable, plus `extra`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("STATOR_", "DYN_", "PYTHON", "OTEL_"))}
    return kept | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"} | dict(extra)


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago; for programs that cannot be told to choose one themselves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def group_cpu_seconds(group: int) -> float:
    """User and system CPU seconds of the living processes of a group, all threads; resolution is one clock tick."""
    ticks = 0
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICK


def resident_bytes(pid: int | str = "self") -> int:
    """Resident memory of one process."""
    with open(f"/proc/{pid}/statm") as statm:
        return int(statm.read().split()[1]) * _PAGE


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
