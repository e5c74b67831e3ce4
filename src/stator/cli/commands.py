"""`stator serve | worker | frontend | ls`."""

import asyncio
import io
import logging
import sys
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from stator import __version__, settings
from stator.cli.certs import certs_app
from stator.cli.frontend import run_frontend
from stator.cli.joining import CompatibleOption, DiscoveryOption, Joining, PlaneOption, RequestPlaneOption
from stator.cli.keys import keys_app
from stator.cli.listing import list_cluster
from stator.cli.serve import ServeOptions, run_serve
from stator.cli.supervision import NewsKind, tell
from stator.cli.worker import run_worker
from stator.errors import StatorError, UsageError
from stator.runtime.signals import run
from stator.telemetry import LogConfig, TraceConfig, configure_logging, configure_tracing

__all__ = ["app"]

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="stator",
    help="Serve language models from Python workers: an OpenAI-compatible endpoint, and any number of processes behind it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

Model = Annotated[str, typer.Option(help="Model: a directory or an id. Empty: the echo engine with its built-in tokenizer.")]
Engine = Annotated[
    str,
    typer.Option(
        help="What generates: echo, transformers, mocker, a plug-in, or your own as module:Class or module:function. "
        "Default: transformers if a model is given, else echo."
    ),
]
Name = Annotated[str, typer.Option(help="Name that clients ask for. Default: the model's own.")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="A setting of the engine; may be repeated.")
]
Namespace = Annotated[str | None, typer.Option(help="Namespace of the workers [default: dynamo].")]
Component = Annotated[str | None, typer.Option(help="Component of the workers [default: backend].")]
Endpoint = Annotated[str | None, typer.Option(help="Endpoint name of the workers [default: generate].")]
Host = Annotated[str | None, typer.Option(help="Address the HTTP endpoint listens on [default: 127.0.0.1].")]
Port = Annotated[int | None, typer.Option(min=0, max=65535, help="Port of the HTTP endpoint; 0: any free one [default: 8000].")]
InsecureBind = Annotated[bool, typer.Option("--insecure-bind", help="Allow plain HTTP beyond this machine.")]
Policy = Annotated[
    str | None,
    typer.Option(help="How frontends choose a worker: round_robin, random, power_of_two, least_loaded, device_weighted."),
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stator {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Settings may also be given as STATOR_* variables; see docs/settings.md."""


def _main(work: Callable[[], Coroutine[Any, Any, int]], *, supervised: bool = False) -> None:
    """Run a command: logging on, errors as one line (told to the supervisor if there is one), the number as exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character the terminal cannot show is no reason to fail
    end_tracing: Callable[[], None] = _nothing
    try:
        logs = settings.load(LogConfig)
        configure_logging(logs)
        end_tracing = configure_tracing(settings.load(TraceConfig), logs, warn=not supervised)
        status = run(work())
    except StatorError as error:
        logger.debug("the command failed", exc_info=error)
        _say_why(error.message, supervised=supervised)
        status = 2 if isinstance(error, UsageError) else 1
    except (KeyboardInterrupt, asyncio.CancelledError):
        status = 130
    except Exception as error:
        logger.exception("the command failed")
        _say_why(f"{type(error).__name__}: {error}", supervised=supervised)
        status = 1
    end_tracing()
    sys.exit(status)


def _nothing() -> None: ...


def _say_why(reason: str, *, supervised: bool) -> None:
    if supervised:
        tell(NewsKind.FAILED, reason)
    else:
        Console(stderr=True, emoji=False).print(f"[bold red]error:[/] {escape(reason)}", highlight=False, soft_wrap=True)


@app.command()
def serve(
    model: Model = "",
    engine: Engine = "",
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 1,
    frontends: Annotated[int, typer.Option(min=1, help="Frontend processes; they share the port.")] = 1,
    host: Host = None,
    port: Port = None,
    name: Name = "",
    option: Options = None,
    policy: Policy = None,
    namespace: Namespace = None,
    component: Component = None,
    isolated: Annotated[
        bool, typer.Option("--isolated", help="Use a discovery directory of its own, so that nobody else's workers are seen.")
    ] = False,
    insecure_bind: InsecureBind = False,
    discovery: DiscoveryOption = None,
    plane: PlaneOption = None,
    request_plane: RequestPlaneOption = None,
    compatible: CompatibleOption = False,
) -> None:
    """Serve a model: frontends on one port and worker processes, supervised until Ctrl-C.

    Without arguments it serves the **echo** model, which answers with your own words.
    """
    options = ServeOptions(
        model=model,
        engine=engine,
        workers=workers,
        frontends=frontends,
        host=host,
        port=port,
        name=name,
        options=tuple(option or ()),
        policy=policy,
        namespace=namespace,
        component=component,
        isolated=isolated,
        insecure_bind=insecure_bind,
        joining=Joining(discovery=discovery, plane=plane, request_plane=request_plane, compatible=compatible),
    )
    _main(lambda: run_serve(options))


@app.command()
def worker(
    model: Model = "",
    engine: Engine = "",
    name: Name = "",
    option: Options = None,
    namespace: Namespace = None,
    component: Component = None,
    endpoint: Endpoint = None,
    discovery: DiscoveryOption = None,
    plane: PlaneOption = None,
    request_plane: RequestPlaneOption = None,
    compatible: CompatibleOption = False,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
) -> None:
    """Run one worker process: an engine on an endpoint, its model registered for every frontend of the cluster."""
    _main(
        lambda: run_worker(
            model=model,
            engine=engine,
            options=tuple(option or ()),
            place={"served_name": name or None, "namespace": namespace, "component": component, "endpoint": endpoint},
            joining=Joining(discovery=discovery, plane=plane, request_plane=request_plane, compatible=compatible),
            supervised=supervised,
        ),
        supervised=supervised,
    )


@app.command()
def frontend(
    host: Host = None,
    port: Port = None,
    policy: Policy = None,
    insecure_bind: InsecureBind = False,
    discovery: DiscoveryOption = None,
    plane: PlaneOption = None,
    compatible: CompatibleOption = False,
    supervised: Annotated[bool, typer.Option("--supervised", hidden=True)] = False,
) -> None:
    """Run one frontend process: OpenAI's HTTP API for every model that workers of the cluster have registered."""
    _main(
        lambda: run_frontend(
            host=host,
            port=port,
            policy=policy,
            insecure_bind=insecure_bind,
            joining=Joining(discovery=discovery, plane=plane, compatible=compatible),
            supervised=supervised,
        ),
        supervised=supervised,
    )


@app.command("ls")
def ls(
    json: Annotated[bool, typer.Option("--json", help="One JSON object per record instead of a table.")] = False,
    discovery: DiscoveryOption = None,
) -> None:
    """List what is registered: endpoints, instances, where they are, their models, and when they last gave a sign of life."""
    _main(lambda: list_cluster(Joining(discovery=discovery), as_json=json))


app.add_typer(keys_app(_main))
app.add_typer(certs_app(_main))
