"""The page about errors lists every class with its code, and says truly whether it is retryable."""

from pathlib import Path

from stator import errors

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


def test_every_error_is_listed_with_its_code_and_whether_it_is_retryable() -> None:
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    listed = {row[0].strip(" `"): (row[1].strip(" `"), row[3].strip()) for row in rows}
    classes = {name: getattr(errors, name) for name in errors.__all__}
    assert listed == {name: (kind.code, "yes" if kind.retryable else "no") for name, kind in classes.items()}
