"""Writes `docs/errors.md` from the error tree: `python docs/errors_page.py`.

With `--check` it writes nothing and fails when the page is out of date.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from stator import errors
from stator.errors import EngineError, StatorError, Timeout
from stator.protocol.stream import Phase
from stator.protocol.wire_errors import BACKEND_KINDS, RUNTIME_KINDS, from_wire, to_wire

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "errors.md"

INTRODUCTION = """\
# Errors

Written by `python docs/errors_page.py`; do not edit.

Every error Stator raises is a `stator.StatorError`. The class says who must act; `code` is stable (it travels on the wire and
labels metrics); `retryable` says whether another instance may be tried, as long as no item was delivered. `Disconnected` is also a
`ConnectionError`, `Timeout` also a `TimeoutError`.
"""

FIELDS = """
Each has `message`, `instance` (the id of the instance concerned, 0 for none) and `phase` (what was being waited for, see
[deadlines](runtime.md#deadlines)), and the columns above as `fault`, `http_status` and `advice`. Decide by class, `code` or
`retryable`, never by the text.

The HTTP status is what the frontend answers when the error ends a request before its first byte (see
[serving](serving.md#the-http-api)); that of `Overloaded` can be set (`STATOR_HTTP_OVERLOAD_STATUS`). What an HTTP client did wrong
itself does not get as far as a worker: it is answered with 4xx and told what.

## On the wire

On the native plane an error arrives as what it was. The compatible plane has the kinds of the reference:

| kind there | arrives as | is sent for |
|---|---|---|
"""

CONCLUSION = """
The message always stays. `Disconnected` after the first item is `StreamIncomplete` to whoever reads it. A reference process that
does not begin to answer says why in words alone, which arrive as `ConnectFailed`. What a handler raises that is no `StatorError`
is sent as `Backend` kind: `ValueError` and `TypeError` as `InvalidArgument`, `TimeoutError` as `ConnectionTimeout`,
`ConnectionError` as `Disconnected`, `asyncio.CancelledError` as `Cancelled`, anything else as `Unknown`.

## On the command line

One line on stderr, `error: …`, and the exit status: 2 when the command line or a setting is wrong, 1 when something could not be
started, 130 after a second Ctrl-C. `STATOR_LOG=debug` adds the traceback.
"""


def catalogue() -> list[tuple[str, StatorError]]:
    """Every entry, in the order of the tree: how it is called, and an example of it."""
    found: list[tuple[str, StatorError]] = []
    for kind, _ in tree(StatorError):
        found.append((f"`{kind.__name__}`", kind("")))
        if kind is EngineError:
            found.append((f'`{kind.__name__}`, kind `"InvalidArgument"`', EngineError("", kind="InvalidArgument")))
    return found


def tree(root: type[StatorError], depth: int = 0) -> Iterator[tuple[type[StatorError], int]]:
    """`root` and all below it, each with its depth, in the order in which they were written."""
    yield root, depth
    for kind in root.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from tree(kind, depth + 1)


def drawing(root: type[StatorError], before: str = "") -> Iterator[str]:
    """The lines of the tree."""
    below = [kind for kind in root.__subclasses__() if kind.__module__ == errors.__name__]
    for kind in below:
        last = kind is below[-1]
        yield f"{before}{'└' if last else '├'}── {kind.__name__}"
        yield from drawing(kind, before + ("    " if last else "│   "))


def table() -> Iterator[str]:
    """The rows of the catalogue."""
    yield "| error | code | what happened | whose fault | retryable | HTTP status | what to do |"
    yield "|---|---|---|---|---|---|---|"
    for name, error in catalogue():
        happened = " ".join((type(error).__doc__ or "").split("\n\n")[0].split()).removesuffix(".")
        if isinstance(error, EngineError):
            happened = "The handler raised" if error.kind == "Unknown" else "The handler found the request wrong"
        retryable = "yes" if error.retryable else "no"
        yield f"| {name} | `{error.code}` | {happened} | {error.fault} | {retryable} | {error.http_status} | {error.advice} |"


def wire() -> Iterator[str]:
    """The reference's kinds, what becomes of each and what becomes each."""
    sent: dict[str, list[str]] = {}
    for name, error in (*catalogue(), ("`Timeout` while connecting", Timeout("", phase=Phase.CONNECT.label))):
        kind = to_wire(error).error_type
        if isinstance(kind, str):
            sent.setdefault(kind, []).append(name)
    for kind in sorted(RUNTIME_KINDS):
        error = from_wire({"error_type": kind, "message": ""}, phase=Phase.FIRST_ITEM)
        here = f"`{type(error).__name__}`" + (f', kind `"{error.kind}"`' if isinstance(error, EngineError) else "")
        yield f"| `{kind}` | {here} | {', '.join(sent.pop(kind, ['–']))} |"
    assert not sent, f"{sent} are no kinds of the reference"
    kinds = ", ".join(f"`{kind}`" for kind in sorted(BACKEND_KINDS))
    yield f"| `Backend` with one of {kinds} | `EngineError` of that kind | `EngineError` |"


def page() -> str:
    """The whole of `docs/errors.md`."""
    lines = ["", "```text", StatorError.__name__, *drawing(StatorError), "```", "", *table()]
    return INTRODUCTION + "\n".join(lines) + "\n" + FIELDS + "\n".join(wire()) + "\n" + CONCLUSION


def main(arguments: list[str]) -> int:
    text = page()
    if PAGE.exists() and PAGE.read_text("utf-8") == text:
        return 0
    if "--check" in arguments:
        sys.stderr.write(f"{PAGE.relative_to(ROOT)} is out of date; run python docs/errors_page.py\n")
        return 1
    PAGE.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
