"""`stator keys add | list | remove`: the file of API keys, changed without stopping a frontend."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, date, datetime, time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stator import settings
from stator.errors import UsageError
from stator.frontend.config import FrontendConfig
from stator.frontend.key_file import KeyRecord, read_keys
from stator.frontend.key_file_edit import Value, add_key, remove_key
from stator.security.key_hashes import hash_text, new_key

__all__ = ["keys_app"]

File = Annotated[Path | None, typer.Option("--file", "-f", help="The file of keys [default: the setting http.api_keys_path].")]
KeyName = Annotated[str, typer.Option("--name", help="Name of the key: the tenant in metrics, logs and the fair queue.")]

Run = Callable[[Callable[[], Coroutine[Any, Any, int]]], None]
"""runs a command to its exit status"""


def keys_app(run: Run) -> typer.Typer:
    """The commands below `stator keys`."""
    app = typer.Typer(name="keys", help="API keys of the frontends, kept as hashes in a file.", no_args_is_help=True)

    @app.command()
    def add(
        name: KeyName,
        file: File = None,
        rpm: Annotated[int | None, typer.Option(help="Requests per minute [default: any number].")] = None,
        tpm: Annotated[int | None, typer.Option(help="Tokens per minute, prompts and answers [default: any number].")] = None,
        concurrent: Annotated[int | None, typer.Option(help="Requests at one time [default: any number].")] = None,
        models: Annotated[
            str | None,
            typer.Option(help="Models, separated by commas; `*` at the end of one stands for any rest [default: all]."),
        ] = None,
        priorities: Annotated[
            str | None,
            typer.Option(help="Priorities (high, normal, low), separated by commas, the usual one first [default: all]."),
        ] = None,
        expires: Annotated[
            str | None, typer.Option(help="Date or time of its end, as 2030-01-31 or 2030-01-31T12:00+01:00.")
        ] = None,
        admin: Annotated[
            bool, typer.Option("--admin", help="It opens /metrics and the admin routes on other machines.")
        ] = False,
    ) -> None:
        """Make a key. It is printed once, and is nowhere afterwards: the file has its hash."""
        given: dict[str, Value | None] = {
            "expires": _instant(expires),
            "models": _parts(models),
            "priorities": _parts(priorities),
            "requests_per_minute": rpm,
            "tokens_per_minute": tpm,
            "concurrent_requests": concurrent,
            "admin": admin or None,
        }
        limits = {field: value for field, value in given.items() if value is not None}
        run(lambda: asyncio.to_thread(_add, file, name, limits))

    @app.command("list")
    def list_(file: File = None) -> None:
        """Show names, limits and rights. Keys cannot be shown: nobody has them but their users."""
        run(lambda: asyncio.to_thread(_list, file))

    @app.command()
    def remove(name: KeyName, file: File = None) -> None:
        """Take a key out of the file. Its running requests finish, new ones are refused within a second."""
        run(lambda: asyncio.to_thread(_remove, file, name))

    return app


def _add(file: Path | None, name: str, limits: dict[str, Value]) -> int:
    path = _path(file)
    key = new_key()
    add_key(path, {"name": name, "hash": hash_text(key), **limits})
    typer.echo(key.reveal())
    _say(f"added [bold]{escape(name)}[/] to {escape(str(path))}; the key above is shown this once")
    return 0


def _list(file: Path | None) -> int:
    table = Table("name", "models", "requests/min", "tokens/min", "at one time", "priorities", "expires", "admin", box=None)
    for record in read_keys(_path(file)):
        table.add_row(*map(escape, _row(record)))
    Console(emoji=False).print(table, soft_wrap=True)
    return 0


def _row(record: KeyRecord) -> tuple[str, ...]:
    expires = "never" if record.expires is None else datetime.fromtimestamp(record.expires, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return (
        record.name,
        "all" if record.models is None else ", ".join(record.models),
        _number(record.requests_per_minute),
        _number(record.tokens_per_minute),
        _number(record.concurrent_requests),
        "all" if record.priorities is None else ", ".join(priority.label for priority in record.priorities),
        expires,
        "yes" if record.admin else "",
    )


def _remove(file: Path | None, name: str) -> int:
    path = _path(file)
    remove_key(path, name)
    _say(f"removed [bold]{escape(name)}[/] from {escape(str(path))}")
    return 0


def _path(file: Path | None) -> Path:
    path = file or settings.load(FrontendConfig).api_keys_path
    if path is None:
        raise UsageError("which file? give --file, or set STATOR_HTTP_API_KEYS_PATH")
    return path


def _parts(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _instant(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text) if len(text) > 10 else datetime.combine(date.fromisoformat(text), time(), UTC)
    except ValueError:
        found = None
    if found is None or found.tzinfo is None:
        raise typer.BadParameter(
            "expected a date, or a time with its zone, as in 2030-01-31T12:00:00+01:00", param_hint="--expires"
        )
    return found


def _number(limit: int | None) -> str:
    return "any" if limit is None else str(limit)


def _say(text: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True, emoji=False).print(text)
