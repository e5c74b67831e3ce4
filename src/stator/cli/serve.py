"""`stator serve`: frontends on one port and workers behind them, supervised, until Ctrl-C."""

import asyncio
import shlex
import tempfile
from contextlib import ExitStack
from pathlib import Path
from random import Random, SystemRandom

import aiohttp
import msgspec
from rich.console import Console

from stator import settings
from stator.cli.frontend import frontend_config
from stator.cli.supervisor import Child, Supervisor
from stator.cli.worker import engine_name
from stator.errors import StatorError
from stator.frontend import bind
from stator.runtime.signals import shutdown_event
from stator.tasks import Scope

__all__ = ["ServeOptions", "run_serve"]

_FRONTEND_LIMIT = 8.0
_WORKER_LIMIT = 40.0
"""seconds children get to end by themselves"""


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
    isolated: bool
    insecure_bind: bool


async def run_serve(options: ServeOptions) -> int:
    """Start everything, wait until a request went through, say so, and stop cleanly. Returns the exit status."""
    console = Console(highlight=False, soft_wrap=True)
    config = await asyncio.to_thread(frontend_config, host=options.host, port=options.port, insecure_bind=options.insecure_bind)
    ending = shutdown_event()
    with ExitStack() as stack:
        changes: dict[str, str | None] = {}
        if options.isolated:
            changes["STATOR_FILE_ROOT"] = stack.enter_context(tempfile.TemporaryDirectory(prefix="stator-"))
        held = stack.enter_context(bind(config))  # keeps the port for all frontends; never listens
        port = held.getsockname()[1]
        environment = settings.child_environment(changes)
        told = _Teller(console)
        workers = _workers(options, environment, told)
        frontends = _frontends(options, port, environment, told)
        supervisor = Supervisor(Random(SystemRandom().getrandbits(64)))
        url = f"http://{config.host}:{port}"
        engine = engine_name(options.engine, options.model)
        console.print(f"[bold]stator[/] starting {options.workers} × {engine}, {options.frontends} × frontend")
        async with Scope("serve") as scope:
            watching = scope.spawn(supervisor.watch([*workers, *frontends], scope), name="supervisor")
            greeting = scope.spawn(_greet(url, console, changes), name="greeting")
            stopping = scope.spawn(ending.wait(), name="signal")
            try:
                await asyncio.wait((watching, stopping), return_when=asyncio.FIRST_COMPLETED)
                greeting.cancel()
                if watching.done() and isinstance(error := watching.exception(), StatorError):
                    raise error
            finally:
                console.print("stopping …")
                await supervisor.end(frontends, _FRONTEND_LIMIT)
                await supervisor.end(workers, _WORKER_LIMIT)
        console.print("stopped")
    return 0


class _Teller:
    """Shows what children say; the frontends' addresses are ours to announce."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def __call__(self, name: str, text: str) -> None:
        if not text.startswith("listening"):
            self._console.print(f"  [dim]{name}:[/] {text}")


def _workers(options: ServeOptions, environment: dict[str, str], told: _Teller) -> list[Child]:
    arguments = ["worker", "--supervised"]
    for flag, value in (
        ("--model", options.model),
        ("--engine", options.engine),
        ("--name", options.name),
        ("--namespace", options.namespace),
    ):
        if value:
            arguments += [flag, value]
    for pair in options.options:
        arguments += ["--option", pair]
    # all of us end together: nobody has to be given time to notice
    own = {"STATOR_WORKER_GRACE_PERIOD": "0", **environment}
    return [Child(f"worker {number + 1}", arguments, own, told) for number in range(options.workers)]


def _frontends(options: ServeOptions, port: int, environment: dict[str, str], told: _Teller) -> list[Child]:
    arguments = ["frontend", "--supervised", "--port", str(port)]
    if options.host:
        arguments += ["--host", options.host]
    if options.policy:
        arguments += ["--policy", options.policy]
    if options.insecure_bind:
        arguments.append("--insecure-bind")
    return [Child(f"frontend {number + 1}", arguments, environment, told) for number in range(options.frontends)]


async def _greet(url: str, console: Console, changes: dict[str, str | None]) -> None:
    """Wait until a request went through, then say how to send one."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=60)) as session:
        model = await _first_model(session, url)
        while not await _answers(session, url, model):
            await asyncio.sleep(0.2)
    body = msgspec.json.encode(
        {"model": model, "stream": True, "messages": [{"role": "user", "content": "Hello from Stator! 👋"}]}
    ).decode()
    console.print(f"\n[bold green]ready[/] model [bold]{model}[/] at [bold]{url}/v1[/]  (Ctrl-C stops)\n")
    command = f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' -d {shlex.quote(body)}"
    console.print(command, markup=False)
    root = changes.get("STATOR_FILE_ROOT")
    if root:
        console.print(f"\n[dim]STATOR_FILE_ROOT={Path(root)} stator ls   shows what is registered[/]")


async def _first_model(session: aiohttp.ClientSession, url: str) -> str:
    while True:
        try:
            async with session.get(f"{url}/v1/models") as answer:
                models = (await answer.json())["data"]
                if models:
                    return str(models[0]["id"])
        except (aiohttp.ClientError, TimeoutError, KeyError, ValueError):
            pass
        await asyncio.sleep(0.1)


async def _answers(session: aiohttp.ClientSession, url: str, model: str) -> bool:
    body = {"model": model, "prompt": "ready?", "max_tokens": 1}
    try:
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            return answer.status == 200
    except (aiohttp.ClientError, TimeoutError):
        return False
