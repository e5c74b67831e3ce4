"""A model's files on this machine."""

# pyright: basic, reportMissingImports=false
# huggingface_hub belongs to an extra (absent where types are checked).

from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download

from stator.errors import ConfigError

__all__ = ["TEXT_FILES", "local_directory"]

TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
"""what a card is made from: configurations, tokenizer, templates"""


def local_directory(source: str, *, files: Sequence[str], report: Callable[[str], None]) -> Path:
    """`source` itself if it is a directory, else that of the model of this id, whose `files` are fetched unless they are in the cache.

    Blocks. Raises `ConfigError` with what the hub said.
    """
    if Path(source).is_dir():
        return Path(source)
    report(f"fetching {source}")
    try:
        return Path(snapshot_download(source, allow_patterns=list(files)))
    except Exception as error:  # the hub's client, its HTTP library and the operating system each have errors of their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{source!r} is no directory, and no model of that id could be fetched: {reason}") from error
