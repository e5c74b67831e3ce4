"""`stator serve`: frontends on one port and workers behind them, supervised, until Ctrl-C."""

import asyncio
import os
import shlex
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from random import Random, SystemRandom
from socket import socket

import msgspec
from rich.console import Console
from rich.markup import escape

from stator import settings
from stator.cli.frontend import frontend_config
from stator.cli.greeting import example_request, first_answer
from stator.cli.joining import Joining, check_joining
from stator.cli.supervision import News, NewsKind
from stator.cli.supervisor import Child, Supervisor
from stator.cli.worker import StartFailed, engine_name, worker_config
from stator.frontend import FrontendConfig, bind
from stator.runtime.plugins import check_settings
from stator.runtime.signals import shutdown_event
from stator.tasks import Scope
from stator.worker import WorkerConfig

__all__ = ["ServeOptions", "run_serve"]

_STATOR = (sys.executable, "-P", "-m", "stator")
"""-P: a file in the working directory must not hide a library of the same name"""
_MARGIN = 5.0
"""seconds children get to end beyond what their settings allow them"""


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line said."""

    model: str
    engine: str
    workers: int
    frontends: int
    host: str | None
    port: int | None
    name: str
    options: tuple[str, ...]
    policy: str | None
    namespace: str | None
    component: str | None
    isolated: bool
    insecure_bind: bool
    joining: Joining = Joining()

    @property
    def place(self) -> dict[str, str | None]:
        """What it says about the workers' settings."""
        return {"served_name": self.name or None, "namespace": self.namespace, "component": self.component}


async def run_serve(options: ServeOptions) -> int:
    """Start everything, wait until a request went through, say so, and stop cleanly. Returns the exit status."""
    await asyncio.to_thread(check_settings)
    await asyncio.to_thread(check_joining, options.joining, isolated=options.isolated)
    config = await asyncio.to_thread(frontend_config, host=options.host, port=options.port, insecure_bind=options.insecure_bind)
    workers = await asyncio.to_thread(worker_config, options.place)
    with ExitStack() as stack:
        changes = options.joining.variables
        if options.isolated:
            changes["STATOR_DISCOVERY"] = "file"
            changes["STATOR_FILE_ROOT"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="stator-"))
        held = stack.enter_context(_hold(config))
        await _Service(options, config, workers, port=held.getsockname()[1], changes=changes).run()
    return 0


def _hold(config: FrontendConfig) -> socket:
    """A socket that keeps the port for all frontends and never listens itself. `ConfigError` if somebody else has the port."""
    if config.port:
        bind(config).close()
    return bind(config, shared=True)


class _Service:
    """All the processes of one `stator serve`, and what they show."""

    def __init__(
        self,
        options: ServeOptions,
        config: FrontendConfig,
        workers: WorkerConfig,
        *,
        port: int,
        changes: Mapping[str, str | None],
    ) -> None:
        self._options = options
        self._console = Console(highlight=False, soft_wrap=True, emoji=False)
        self._root = changes.get("STATOR_FILE_ROOT")
        self._frontend_limit = config.graceful_shutdown + _MARGIN
        self._worker_limit = workers.grace_period + workers.drain_timeout + workers.cleanup_timeout + _MARGIN
        self._url = _url(config, port)
        self._needs_key = config.api_keys_path is not None
        self._model: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        environment = settings.child_environment(changes)
        # Limits of API keys hold for all frontends together; who has more of them elsewhere says how many.
        environment["STATOR_HTTP_API_KEY_SHARES"] = str(max(config.api_key_shares, options.frontends))
        # As many threads as cores in each worker would slow all of them down. Torch and OpenMP read this.
        environment.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // options.workers)))
        if workers.grace_period == WorkerConfig().grace_period:
            # All of us end together: nobody has to be given time to notice.
            environment["STATOR_WORKER_GRACE_PERIOD"] = "0"
        self._workers = [
            Child(f"worker {number}", _worker_command(options), environment, self._told)
            for number in range(1, options.workers + 1)
        ]
        self._frontends = [
            Child(f"frontend {number}", _frontend_command(options, port), environment, self._told)
            for number in range(1, options.frontends + 1)
        ]

    async def run(self) -> None:
        """Until a signal. Raises `StartFailed` when a process cannot be started; nothing is left running either way."""
        engine = engine_name(self._options.engine, self._options.model)
        self._show(f"[bold]stator[/] starting {self._options.workers} × {escape(engine)}, {self._options.frontends} × frontend")
        supervisor = Supervisor(Random(SystemRandom().getrandbits(64)))
        async with Scope("serve") as scope:
            supervisor.start([*self._workers, *self._frontends], scope)
            failed = scope.spawn(supervisor.gave_up(), name="failure")
            ended = scope.spawn((shutdown_event() or asyncio.Event()).wait(), name="signal")
            scope.spawn(self._greet(), name="greeting")
            try:
                await asyncio.wait((failed, ended), return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._show("stopping …")
                await supervisor.end(self._frontends, timeout=self._frontend_limit)
                await supervisor.end(self._workers, timeout=self._worker_limit)
        if failed.done() and not failed.cancelled():
            raise StartFailed(failed.result())
        self._show("stopped")

    def _told(self, name: str, news: News) -> None:
        """Show what a child says; the frontends' addresses are ours to announce."""
        text = escape(news.text)
        if news.kind is NewsKind.READY:
            if name.startswith("frontend"):
                return
            if not self._model.done():
                self._model.set_result(news.text)
            text = f"ready, serves {text}"
        self._show(f"  [dim]{name}:[/] {text}")

    async def _greet(self) -> None:
        """Wait until a request went through, then say how to send one."""
        model = await self._model
        path = await first_answer(self._url, model, say=lambda text: self._show(f"  [dim]waiting for[/] {escape(text)}"))
        self._show(f"\n[bold green]ready[/]: model [bold]{escape(model)}[/] at [bold]{self._url}/v1[/]  (Ctrl-C stops)\n")
        example = msgspec.json.encode(example_request(path, model)).decode()
        key = " -H 'Authorization: Bearer YOUR_KEY'" if self._needs_key else ""
        command = f"curl -N {self._url}{path} -H 'Content-Type: application/json'{key} -d {shlex.quote(example)}"
        self._console.print(command, markup=False)
        if self._root:
            self._show(f"\n[dim]STATOR_FILE_ROOT={escape(self._root)} stator ls   shows what is registered[/]")

    def _show(self, text: str) -> None:
        self._console.print(text)


def _worker_command(options: ServeOptions) -> list[str]:
    arguments = [*_STATOR, "worker", "--supervised"]
    for flag, value in (
        ("--model", options.model),
        ("--engine", options.engine),
        ("--name", options.name),
        ("--namespace", options.namespace),
        ("--component", options.component),
    ):
        if value:
            arguments += [flag, value]
    for pair in options.options:
        arguments += ["--option", pair]
    return arguments


def _frontend_command(options: ServeOptions, port: int) -> list[str]:
    arguments = [*_STATOR, "frontend", "--supervised", "--port", str(port)]
    if options.host:
        arguments += ["--host", options.host]
    if options.policy:
        arguments += ["--policy", options.policy]
    if options.insecure_bind:
        arguments.append("--insecure-bind")
    return arguments


def _url(config: FrontendConfig, port: int) -> str:
    """Where somebody on this machine reaches the frontends."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host.strip("[]"), config.host.strip("[]"))
    scheme = "https" if config.tls_cert_path else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
