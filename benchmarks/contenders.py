"""Who is measured on the planes, and how a pair of worker and client process is started."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.children import ROOT, Child, ChildFailed, child_environment

__all__ = [
    "FLOOR",
    "NATIVE_TCP",
    "QUIET",
    "REFERENCES",
    "REFERENCE_ENVIRONMENT",
    "RUNTIMES",
    "STATOR_ENVIRONMENT",
    "Contender",
    "Session",
    "choose",
    "reference",
    "sessions",
    "start",
    "stator",
]

_START_LIMIT = 30.0
REFERENCE_ENVIRONMENT = {
    "DYN_DISCOVERY_BACKEND": "file",
    "DYN_FILE_KV": "{directory}/kv",
    "DYN_REQUEST_PLANE": "tcp",
    "DYN_EVENT_PLANE": "zmq",
    "DYN_TCP_RPC_HOST": "127.0.0.1",
    "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
    "DYN_TCP_WORKER_POOL_SIZE": "20000",
    "DYN_LOG": "info",
    "DYN_SYSTEM_PORT": "0",
    "DYN_SYSTEM_HOST": "127.0.0.1",
}
"""The reference without any server, on loopback; `{directory}` is the session's own.

It logs as it does by default, a line when a request comes and one when it ends, and shows health and metrics. Its worker runs 10 000
requests at once unless told otherwise, and the question about idle streams asks for one more.
"""

STATOR_ENVIRONMENT = {
    "STATOR_DISCOVERY": "file",
    "STATOR_FILE_ROOT": "{directory}/discovery",
    "DYN_TCP_WORKER_POOL_SIZE": "20000",
    "XDG_RUNTIME_DIR": "{directory}",
    "STATOR_LOG": "info",
    "STATOR_HEALTH_PORT": "0",
}
"""Stator with discovery and sockets in the session's own directory, as many slots as the reference gets, a line for each request,
health and metrics.
"""


class Contender(msgspec.Struct, frozen=True, kw_only=True):
    """One runtime under measurement: the modules of its two processes and the interpreter that has what they import."""

    name: str
    label: str
    package: str
    """the folder of `benchmarks` with `worker` and `client`"""
    prefix: str = ""
    """of both modules' names"""
    python: Path = Path(sys.executable)
    environment: Mapping[str, str] = {}
    dialled: bool = False
    """the worker prints its port and the client gets it as argument; otherwise they find each other by discovery"""


class Session(msgspec.Struct, frozen=True, kw_only=True):
    """A contender's two running processes."""

    contender: Contender
    worker: Child
    client: Child

    def measure(self, order: Mapping[str, Any], *, within: float) -> dict[str, float]:
        """Let the client carry out one order of `benchmarks.measures`; `ChildFailed` if it cannot or an answer was wrong."""
        self.worker.check_alive()
        return self.client.ask(order, within=within)


FLOOR = Contender(name="floor", label="TCP floor", package="prototypes", prefix="floor_", dialled=True)


def reference(version: str, folder: str, plane: str = "", **settings: str) -> Contender:
    """The reference; `settings` are variables on top of the usual ones, and `plane` says what they make of it."""
    return Contender(
        name=f"reference-{version}" + (f"-{plane}" if plane else ""),
        label=f"reference {version}" + (f", {plane}" if plane else ""),
        package="reference",
        python=ROOT / folder / "bin" / "python",
        environment=REFERENCE_ENVIRONMENT | settings,
    )


def stator(name: str, label: str, **settings: str) -> Contender:
    """Stator; `settings` are variables on top of the usual ones."""
    return Contender(name=name, label=label, package="ours", environment=STATOR_ENVIRONMENT | settings)


REFERENCES = (reference("1.3.1", ".venv-reference"), reference("1.6.1", ".venv-reference-1.6.1"))
NATIVE_TCP = stator("stator-native-tcp", "Stator native, TCP only", STATOR_PLANE="native", STATOR_NATIVE_UNIX="false")
QUIET = (
    stator("stator-native-quiet", "Stator native, logs off", STATOR_PLANE="native", STATOR_LOG="error"),
    stator("stator-compatible-quiet", "Stator compatible, logs off", STATOR_PLANE="compatible", STATOR_LOG="error"),
)
RUNTIMES = (
    FLOOR,
    *REFERENCES,
    Contender(name="prototype", label="native prototype", package="prototypes", prefix="native_", dialled=True),
    stator("stator-native", "Stator native", STATOR_PLANE="native"),
    NATIVE_TCP,
    stator("stator-compatible", "Stator compatible", STATOR_PLANE="compatible"),
    *QUIET,
)


def choose(contenders: Sequence[Contender], names: Sequence[str]) -> list[Contender]:
    """Those whose name is in `names`; all if it is empty."""
    return [contender for contender in contenders if not names or contender.name in names]


@contextmanager
def start(contender: Contender, directory: Path, places: Mapping[str, str] | None = None) -> Iterator[Session]:
    """Start worker and client and wait until the client found the worker. `directory` is empty and theirs alone; `places` are
    further names that values of the environment may have in braces.

    Raises `ChildFailed` with the reason when one of them does not come up; nothing is left running then.
    """
    if not contender.python.exists():
        raise ChildFailed(f"{contender.python.relative_to(ROOT)} is missing; `make bench` installs it")
    extra = {key: value.format(directory=directory, **(places or {})) for key, value in contender.environment.items()}
    environment = child_environment(extra)

    def command(role: str) -> list[str]:
        return [str(contender.python), "-m", f"benchmarks.{contender.package}.{contender.prefix}{role}"]

    with ExitStack() as stack:
        worker = stack.enter_context(Child("worker", command("worker"), environment=environment, directory=directory))
        port = [str(worker.read(within=_START_LIMIT)["port"])] if contender.dialled else []
        client = stack.enter_context(
            Child("client", command("client") + port, environment=environment, directory=directory, asked=True)
        )
        try:
            client.read(within=_START_LIMIT)
        except ChildFailed:
            worker.check_alive()  # a worker that ended is the better reason
            raise
        yield Session(contender=contender, worker=worker, client=client)


@contextmanager
def sessions(
    contenders: Sequence[Contender], directory: Path, unavailable: dict[str, str], places: Mapping[str, str] | None = None
) -> Iterator[list[Session]]:
    """Start all contenders that are not in `unavailable` yet; those that fail are put there with the reason."""
    with ExitStack() as stack:
        running: list[Session] = []
        for contender in contenders:
            if contender.name in unavailable:
                continue
            own = directory / contender.name
            own.mkdir()
            try:
                running.append(stack.enter_context(start(contender, own, places)))
            except ChildFailed as failure:
                unavailable[contender.name] = str(failure)
        yield running
