"""`docs/dynamo.md` is true: what it calls present can be used, what it calls absent says so, and no name of the reference is left out."""

import ast
import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from interop.peers import REFERENCE, ROOT, needs_reference
from stator.dynamo.errors import NotThere
from stator.dynamo.gaps import GAPS, Gap

pytestmark = pytest.mark.timeout(60)

PAGE = (ROOT / "docs" / "dynamo.md").read_text("utf-8")
ROW = re.compile(r"\| `([\w.]+)` \| (yes|differs|no) \| ?(.*?) ?\|")


def table(section: str) -> dict[str, tuple[str, str]]:
    """Name → whether it is here, and the note."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return {name: (here, note) for name, here, note in ROW.findall(text)}


SECTIONS = ("dynamo.runtime", "dynamo.runtime.logging", "dynamo.llm", "dynamo.llm.exceptions", "dynamo._core")
ROWS = [(module, name, *row) for module in SECTIONS for name, row in table(f"`{module}`").items()]


def found(module: str, name: str) -> Any:
    value: Any = importlib.import_module(f"stator.{module}")
    for part in name.split("."):
        value = getattr(value, part)
    return value


@pytest.mark.parametrize(("module", "name"), [row[:2] for row in ROWS if row[2] != "no"])
def test_what_is_called_present_is_there(module: str, name: str) -> None:
    assert not isinstance(found(module, name), Gap)


@pytest.mark.parametrize(("module", "name", "note"), [(row[0], row[1], row[3]) for row in ROWS if row[2] == "no"])
def test_what_is_called_absent_says_so_when_it_is_used(module: str, name: str, note: str) -> None:
    assert note, "a reason"
    if name in GAPS:
        gap = found(module, name)
        assert note == GAPS[name]
        for use in (gap, lambda: gap.anything):
            with pytest.raises(NotThere, match=re.escape(f"{name} {note}")):
                use()
    elif module == "dynamo._core" and name.startswith("DistributedRuntime."):
        method = found(module, name)
        with pytest.raises(NotThere):
            method() if name.endswith("detached") else method(None)
    else:
        with pytest.raises(AttributeError):
            found(module, name)


def test_all_gaps_are_in_the_table_and_are_the_same_everywhere() -> None:
    absent = {row[1] for row in ROWS if row[2] == "no" and row[0] == "dynamo._core"}
    assert absent >= GAPS.keys()
    assert repr(found("dynamo.llm", "KvRouter")) == repr(found("dynamo._core", "KvRouter")) == "<KvRouter: not in Stator>"
    with pytest.raises(AttributeError):
        found("dynamo._core", "NoNameOfTheReference")


# -- the reference's files ---------------------------------------------------------------------------------------------------


@cache
def reference() -> Path:
    (package,) = REFERENCE.parents[1].glob("lib/python*/site-packages/dynamo")
    return package


def body(file: str) -> list[ast.stmt]:
    return ast.parse((reference() / file).read_text("utf-8")).body


def names_in(statements: list[ast.stmt]) -> dict[str, ast.stmt]:
    """What is defined, assigned or handed on, public names alone."""
    names: dict[str, ast.stmt] = {}
    for statement in statements:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            names.update({target.id: statement for target in statement.targets if isinstance(target, ast.Name)})
        elif isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            names[statement.target.id] = statement
        elif isinstance(statement, ast.ImportFrom) and statement.module == "dynamo._core":
            names.update({alias.asname: statement for alias in statement.names if alias.asname})
    return {name: statement for name, statement in names.items() if not name.startswith("_") and name != "logger"}


@pytest.mark.interop
@needs_reference
def test_every_name_of_the_stub_is_listed() -> None:
    listed = table("`dynamo._core`")
    for name, statement in names_in(body("_core.pyi")).items():
        assert name in listed, name
        if isinstance(statement, ast.ClassDef) and listed[name][0] != "no":
            for member in names_in(statement.body):
                assert f"{name}.{member}" in listed, f"{name}.{member}"
    for member in names_in(body("prometheus_metrics.pyi")):
        assert member in listed, member


@pytest.mark.interop
@needs_reference
@pytest.mark.parametrize(
    ("module", "file"),
    [
        ("dynamo.runtime", "runtime/__init__.py"),
        ("dynamo.runtime.logging", "runtime/logging.py"),
        ("dynamo.llm", "llm/__init__.py"),
        ("dynamo.llm.exceptions", "llm/exceptions.py"),
    ],
)
def test_every_name_of_a_module_is_listed_and_can_be_imported(module: str, file: str) -> None:
    listed, core = table(f"`{module}`"), table("`dynamo._core`")
    for name in names_in(body(file)):
        here = (listed.get(name) or core[name])[0]
        if name in listed and here == "no":
            continue
        assert isinstance(found(module, name), Gap) == (here == "no"), name


@pytest.mark.interop
@needs_reference
def test_the_names_of_metrics_have_the_same_values() -> None:
    ours = importlib.import_module("stator.dynamo.prometheus_names")
    families = {name: one for name, one in names_in(body("prometheus_names.py")).items() if isinstance(one, ast.ClassDef)}
    assert ours.__all__ == sorted(families)
    for name, family in families.items():
        for constant, statement in names_in(family.body).items():
            assert isinstance(statement, ast.Assign)
            assert getattr(getattr(ours, name), constant) == ast.literal_eval(statement.value), f"{name}.{constant}"


@pytest.mark.interop
@needs_reference
def test_every_module_is_listed() -> None:
    listed = table("Modules")
    there = {
        path.name.split(".")[0] for path in reference().iterdir() if not path.name.startswith("__") and path.name != "py.typed"
    }
    assert {f"dynamo.{name}" for name in there} == listed.keys()
    for module, (here, _) in listed.items():
        spec = importlib.util.find_spec(f"stator.{module}")
        assert (spec is not None) == (here != "no"), module
