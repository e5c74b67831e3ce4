"""Processes of the reference, and the discovery directory they share with us."""

import asyncio
import itertools
import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from stator.protocol.records import EndpointRecord, decode_record
from stator.runtime.plugins import load_plugin

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / ".venv-reference" / "bin" / "python"
REFERENCE_NEW = ROOT / ".venv-reference-1.6.1" / "bin" / "python"
HERE = Path(__file__).resolve().parent

needs_reference = pytest.mark.skipif(
    not REFERENCE.exists(), reason="the reference is not installed: `make interop` installs it"
)
needs_newer_reference = pytest.mark.skipif(
    not REFERENCE_NEW.exists(), reason="the reference 1.6.1 is not installed: `make interop` installs it"
)

_tags = itertools.count(1)


class Peer:
    """One process of the reference, asked in lines of JSON."""

    def __init__(self, script: str, root: Path, env: dict[str, str], *, python: Path = REFERENCE) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [str(python), str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "STATOR_"))},
                "DYN_DISCOVERY_BACKEND": "file",
                "DYN_FILE_KV": str(root),
                "DYN_REQUEST_PLANE": "tcp",
                "DYN_EVENT_PLANE": "zmq",
                "DYN_LOG": "error",
                "DYN_TCP_RPC_HOST": "127.0.0.1",
                "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
                **env,
            },
        )
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._ready: queue.Queue[dict[str, Any]] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with suppress(ValueError):
                answer = json.loads(line)
                self._answers.pop(answer.get("tag", 0), self._ready).put(answer)
        self._ready.put({"ended": True})

    def wait_ready(self) -> None:
        """Wait until the process says so; its log is in the failure."""
        answer = self._ready.get(timeout=60)
        assert answer.get("ready"), self.log()

    def log(self) -> str:
        """What it wrote to stderr."""
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-5000:]

    def ask_soon(self, **command: Any) -> "queue.Queue[dict[str, Any]]":
        """Send a command; the answer will be in the queue."""
        tag = next(_tags)
        self._answers[tag] = answer = queue.Queue[dict[str, Any]]()
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"tag": tag, **command}).encode() + b"\n")
        self.process.stdin.flush()
        return answer

    async def ask(self, *, within: float = 30.0, **command: Any) -> dict[str, Any]:
        """Send a command and wait for its answer without blocking the loop."""
        answer = self.ask_soon(**command)
        try:
            return await asyncio.to_thread(answer.get, True, within)
        except queue.Empty:
            raise AssertionError(f"no answer to {command} within {within} s\n{self.log()}") from None

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        """End it, by SIGTERM first."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(5)
        for stream in (self.process.stdin, self.process.stdout, self._log):
            if stream is not None:
                with suppress(OSError):
                    stream.close()


@contextmanager
def peer(script: str, root: Path, *, python: Path = REFERENCE, **env: str) -> Iterator[Peer]:
    """A running process of the reference, of the release that `python` belongs to."""
    process = Peer(script, root, env, python=python)
    try:
        process.wait_ready()
        yield process
    finally:
        process.close()


def discovery_root(factory: pytest.TempPathFactory) -> Path:
    """A directory that both sides use for discovery.

    Plug-ins are looked up here once, outside of any event loop: looking for them reads the disk.
    """
    load_plugin("stator.discovery", "file")
    load_plugin("stator.transports", "tcp")
    load_plugin("stator.routing", "round_robin")
    return factory.mktemp("discovery")


def records_in(root: Path) -> list[EndpointRecord]:
    """What is registered."""
    found: list[EndpointRecord] = []
    for path in (root / "v1" / "instances").glob("*"):
        if not path.name.startswith(".tmp_"):
            with suppress(FileNotFoundError):
                record = decode_record(path.read_bytes())
                assert isinstance(record, EndpointRecord)
                found.append(record)
    return found
