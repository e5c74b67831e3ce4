"""`stator certs init | issue`: a private authority and a certificate for each process, ready for mutual TLS."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

from stator.errors import UsageError

__all__ = ["certs_app"]

Run = Callable[[Callable[[], Coroutine[Any, Any, int]]], None]
"""runs a command to its exit status"""

Hosts = Annotated[
    list[str] | None,
    typer.Option("--host", help="Name or address under which the process is reached too; may be repeated."),
]
Days = Annotated[int, typer.Option(min=1, max=3650, help="How long certificates are valid.")]


def certs_app(run: Run) -> typer.Typer:
    """The commands below `stator certs`."""
    app = typer.Typer(
        name="certs", help="Certificates for TLS between processes, of an authority of your own.", no_args_is_help=True
    )

    @app.command()
    def init(
        directory: Annotated[Path, typer.Argument(metavar="[DIR]", help="Where to put them.")] = Path("certs"),
        name: Annotated[
            list[str] | None,
            typer.Option("--name", help="A process that gets a certificate; may be repeated [default: frontend and worker]."),
        ] = None,
        host: Hosts = None,
        days: Days = 825,
    ) -> None:
        """Make an authority and a certificate for each name, and print the settings that use them. Nothing is ever overwritten."""
        names = tuple(name or ("frontend", "worker"))
        run(lambda: asyncio.to_thread(_init, directory, names, tuple(host or ()), days))

    @app.command()
    def issue(
        name: Annotated[str, typer.Argument(help="The process that gets a certificate.")],
        directory: Annotated[Path, typer.Option("--dir", help="Where `stator certs init` put the authority.")] = Path("certs"),
        host: Hosts = None,
        days: Days = 825,
        renew: Annotated[
            bool, typer.Option("--renew", help="Replace one that is there; running processes take the new one by themselves.")
        ] = False,
    ) -> None:
        """Make one more certificate of the authority that is there."""
        run(lambda: asyncio.to_thread(_issue, directory, name, tuple(host or ()), days, renew))

    return app


def _init(directory: Path, names: tuple[str, ...], hosts: tuple[str, ...], days: int) -> int:
    maker = _maker()
    maker.make_authority(directory)
    for name in names:
        maker.make_certificate(directory, name, hosts=hosts, days=days, renew=False)
    for name in names:
        _show(directory, name)
    typer.echo(f"keep {directory / maker.AUTHORITY_KEY} off the machines that serve: only issuing needs it", err=True)
    return 0


def _issue(directory: Path, name: str, hosts: tuple[str, ...], days: int, renew: bool) -> int:
    _maker().make_certificate(directory, name, hosts=hosts, days=days, renew=renew)
    _show(directory, name)
    return 0


def _maker() -> Any:
    """The module that needs the library."""
    try:
        from stator.cli import certificate_maker
    except ImportError as error:
        raise UsageError("making certificates needs the library cryptography: pip install 'stator[certs]'") from error
    return certificate_maker


def _show(directory: Path, name: str) -> None:
    """The settings of one process, to be pasted or sourced."""
    where = directory.resolve()
    typer.echo(f"# {name}")
    for variable, value in (
        ("CERT_PATH", where / f"{name}.pem"),
        ("KEY_PATH", where / f"{name}-key.pem"),
        ("CA_CERT_PATH", where / "ca.pem"),
        ("CLIENT_CA_CERT_PATH", where / "ca.pem"),
        ("SERVER_NAME", "stator"),
    ):
        typer.echo(f"STATOR_TLS_{variable}={value}")
