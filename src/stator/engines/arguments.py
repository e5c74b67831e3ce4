"""Arguments of another library's engine, as an operator writes them, and what is said when that library is not there."""

import msgspec

from stator.errors import ConfigError

__all__ = ["missing_extra", "read_arguments"]


def read_arguments(text: str, *, setting: str) -> dict[str, object]:
    """`NAME=VALUE, …`, or one JSON object. A value that is JSON (`8`, `0.9`, `true`, `null`, `"8"`) is that, any other a text.

    What values a name may have, the library knows. Raises `ConfigError` for what has neither form.
    """
    if text.lstrip().startswith("{"):
        try:
            return msgspec.json.decode(text, type=dict[str, object])
        except msgspec.MsgspecError as error:
            raise ConfigError(f"{setting} is no JSON object: {error}") from error
    found: dict[str, object] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = pair.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not separator or not name.isidentifier():
            raise ConfigError(f"{setting} has {pair!r} where NAME=VALUE is expected; lists and objects go into one JSON object")
        found[name] = _value(value.strip())
    return found


def _value(text: str) -> object:
    try:
        return msgspec.json.decode(text)
    except msgspec.MsgspecError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def missing_extra(engine: str, error: ModuleNotFoundError) -> ConfigError:
    """One line that says what to install."""
    return ConfigError(f'the {engine} engine needs {error.name}: pip install "stator[{engine}]"')
