"""Writes `docs/settings.md` and `src/stator/known_settings.txt` from the config structs: `python docs/settings_page.py`.

With `--check` it writes nothing and fails when one of them is out of date. Config structs are found by the line
`class Name(Config` in the sources, so that no other module has to be imported.
"""

import importlib
import re
import sys
from pathlib import Path

from stator.config import Config, fields_of
from stator.settings import CONFIG_VARIABLE, SettingRow, describe

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "src"
PAGE = ROOT / "docs" / "settings.md"
KEYS = SOURCES / "stator" / "known_settings.txt"

INTRODUCTION = f"""\
# Settings

Written by `python docs/settings_page.py`; do not edit.

Each setting is looked for in this order: arguments of the call or command, its `STATOR_*` variable, the reference's `DYN_*`
variables, the TOML file named by `{CONFIG_VARIABLE}`, its default. In the file a setting is the key after the dot in the
table before it (`tcp.port` is `port` in `[tcp]`); a key without a dot stands at the top. Durations are seconds, sizes may end
in `KiB`, `MiB` or `GiB`, lists are separated by commas, booleans are `true/false`, `yes/no`, `on/off` or `1/0`. An empty
variable counts as unset.

A malformed `STATOR_*` value or an unknown `STATOR_*` name is an error. Unknown `DYN_*` names are ignored; bad `DYN_*` values do
what the reference does. A secret may also come from a file: `…_FILE` holds the path.
"""


def config_classes() -> list[type[Config]]:
    """Every config struct of the package, by section and name."""
    found: list[type[Config]] = []
    for path in sorted((SOURCES / "stator").rglob("*.py")):
        for name in re.findall(r"^class (\w+)\(Config\b", path.read_text("utf-8"), re.MULTILINE):
            module = ".".join(path.relative_to(SOURCES).with_suffix("").parts).removesuffix(".__init__")
            found.append(getattr(importlib.import_module(module), name))
    return sorted(found, key=lambda config: (config.section, config.__module__, config.__name__))


def page(classes: list[type[Config]]) -> str:
    """The whole of `docs/settings.md`."""
    parts = [INTRODUCTION]
    for config in filter(fields_of, classes):
        summary = " ".join((config.__doc__ or "").split("\n\n")[0].split())
        title = f"`[{config.section}]` · {config.__name__}" if config.section else config.__name__
        parts.append(f"\n## {title}\n\n{summary}\n\n")
        parts.append("| variable | default | expects | meaning | reference |\n|---|---|---|---|---|\n")
        parts.extend(map(_row, describe(config)))
    return "".join(parts)


def keys(classes: list[type[Config]]) -> str:
    """The whole of `known_settings.txt`: one key a line, those of secret files included."""
    names = {key for config in classes for field in fields_of(config) for key in field.keys}
    return "".join(f"{name}\n" for name in sorted(names))


def _row(row: SettingRow) -> str:
    cells = (f"`{row.variable}`", f"`{row.default}`", row.expects, row.doc, ", ".join(f"`{name}`" for name in row.dyn))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def main(arguments: list[str]) -> int:
    classes = config_classes()
    stale = [(path, text) for path, text in ((PAGE, page(classes)), (KEYS, keys(classes))) if _content(path) != text]
    for path, text in stale:
        if "--check" in arguments:
            sys.stderr.write(f"{path.relative_to(ROOT)} is out of date; run python docs/settings_page.py\n")
        else:
            path.write_text(text, "utf-8")
    return 1 if stale and "--check" in arguments else 0


def _content(path: Path) -> str:
    return path.read_text("utf-8") if path.exists() else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
