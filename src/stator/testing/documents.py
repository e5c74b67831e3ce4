"""Documents whose code blocks are run: a block of Python after `<!-- run: name.py -->` is a file of that name."""

import re
from pathlib import Path

__all__ = ["commands", "links", "write_blocks"]

_BLOCK = re.compile(r"<!-- (?:run|test): (\S+) -->\n```python\n(.*?)```", re.DOTALL)
_SHELL = re.compile(r"```sh\n(.*?)```", re.DOTALL)
_LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def write_blocks(document: Path, directory: Path) -> list[str]:
    """Write each named block of `document` to `directory`; the names, in order."""
    blocks = _BLOCK.findall(document.read_text("utf-8"))
    for name, source in blocks:
        (directory / name).write_text(source, encoding="utf-8")
    return [name for name, _ in blocks]


def commands(document: Path) -> list[str]:
    """The lines of its shell blocks, without comments."""
    lines = [
        line.partition("  #")[0].strip() for block in _SHELL.findall(document.read_text("utf-8")) for line in block.splitlines()
    ]
    return [line for line in lines if line and not line.startswith("#")]


def links(document: Path) -> list[str]:
    """What its links point at, the web left out: a path, perhaps with `#heading`."""
    return [target for target in _LINK.findall(document.read_text("utf-8")) if not target.startswith(("http://", "https://"))]
