"""The same programs under the reference's names and under ours: what a worker and a client see, in all four combinations."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from interop.peers import HERE, REFERENCE, needs_reference

pytestmark = [pytest.mark.interop, pytest.mark.timeout(180), needs_reference]

SIDES = {"reference": (str(REFERENCE), "dynamo"), "stator": (sys.executable, "stator.dynamo")}
PAIRS = [(worker, client) for worker in SIDES for client in SIDES]


def environment(side: str, root: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "STATOR_"))},
        "NAMES": SIDES[side][1],
        "COMPONENT": "backend",
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(root / "discovery"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_LOG": "error",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
    }


@contextmanager
def program(script: str, side: str, root: Path) -> Iterator["subprocess.Popen[str]"]:
    with (root / f"{script}.log").open("w") as log:
        process = subprocess.Popen(
            [SIDES[side][0], str(HERE / script)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment(side, root),
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate(timeout=20)


def meet(worker_side: str, client_side: str, root: Path) -> dict[str, Any]:
    """What both said."""
    with program("names_worker.py", worker_side, root) as worker:
        assert worker.stdout is not None
        first = worker.stdout.readline()
        assert first, (root / "names_worker.py.log").read_text()
        with program("names_client.py", client_side, root) as client:
            output, _ = client.communicate(timeout=90)
            assert client.returncode == 0, (root / "names_client.py.log").read_text()[-3000:]
        rest, _ = worker.communicate(timeout=30)
    status = worker.returncode
    if worker_side == "reference" and status == -signal.SIGSEGV:
        status = 0  # having said all, its interpreter crashes now and then while it is taken down
    return {"worker": json.loads(first), **json.loads(output), "end": [rest.strip(), status]}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """One after another: a worker of the reference that leaves while others compete for the processor may cut its last stream."""
    return {pair: meet(*pair, tmp_path_factory.mktemp("-".join(pair))) for pair in PAIRS}


@pytest.mark.parametrize(
    "what", ["ordinary", "handlers", "errors", "contexts", "metadata", "instances", "paths", "leaving", "end"]
)
@pytest.mark.parametrize("pair", PAIRS[1:], ids=lambda pair: f"{pair[0]}-worker-{pair[1]}-client")
def test_a_program_sees_what_it_sees_with_the_reference_alone(
    seen: dict[tuple[str, str], dict[str, Any]], pair: tuple[str, str], what: str
) -> None:
    assert seen[pair][what] == seen[PAIRS[0]][what]


@pytest.mark.parametrize("client", SIDES)
def test_a_worker_is_refused_the_same_arguments(seen: dict[tuple[str, str], dict[str, Any]], client: str) -> None:
    assert seen["stator", client]["worker"] == seen["reference", client]["worker"]
