"""Changing the file of keys: comments stay, half a change is never seen, and nobody gets to read more than before."""

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

import pytest

from stator.errors import ConfigError, UsageError
from stator.frontend import key_file_edit
from stator.frontend.key_file import read_keys
from stator.frontend.key_file_edit import Value, add_key, remove_key


def fields(name: str, **more: Value) -> Mapping[str, Value]:
    digest = name.encode().hex().ljust(64, "0")[:64]
    return {"name": name, "hash": f"sha256:{digest}", **more}


def names(path: Path) -> list[str]:
    return [record.name for record in read_keys(path)]


def test_a_new_file_is_ours_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, fields("one"))
    add_key(path, fields("two"))
    assert names(path) == ["one", "two"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().startswith("# API keys")
    assert os.listdir(tmp_path) == ["keys.toml"]


def test_all_fields_are_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    record = add_key(
        path,
        fields(
            "all",
            models=["a", 'with "quotes" \\ and ü', "x*"],
            priorities=["low"],
            requests_per_minute=5,
            tokens_per_minute=6,
            concurrent_requests=7,
            expires=datetime(2030, 1, 1, 1, tzinfo=UTC),
            admin=True,
        ),
    )
    assert read_keys(path) == [record]
    assert record.models == ("a", 'with "quotes" \\ and ü', "x*")
    assert record.expires == 1893459600.0
    assert record.admin


COMMENTED = """\
# top

# the first
[[keys]]
name = "one"  # indeed
hash = "sha256:{0}1"

# the second
# has two lines
[[keys]]
name = "two"
hash = "sha256:{0}2"
# its limits
requests_per_minute = 5

[[keys]]
name = "three"
hash = "sha256:{0}3"
""".format("0" * 63)


def test_comments_and_order_stay(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(COMMENTED)
    add_key(path, fields("four"))
    assert path.read_text().startswith(COMMENTED)
    remove_key(path, "two")
    text = path.read_text()
    assert names(path) == ["one", "three", "four"]
    for kept in ("# top", "# the first", "# indeed"):
        assert kept in text
    for gone in ("# the second", "# has two lines", "# its limits", '"two"'):
        assert gone not in text
    for name in ("four", "one", "three"):
        remove_key(path, name)
    assert names(path) == []
    assert "# top" in path.read_text()


def test_a_file_whose_last_key_goes_still_says_that_there_are_none(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text('[[keys]]\nname = "one"\nhash = "sha256:{}"'.format("0" * 64))  # and no newline at its end
    add_key(path, fields("two"))
    assert names(path) == ["one", "two"]
    remove_key(path, "one")
    remove_key(path, "two")
    assert names(path) == []


def test_names_that_are_taken_unknown_or_wrong(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, fields("one"))
    before = path.read_text()
    with pytest.raises(UsageError, match="has a key called 'one'"):
        add_key(path, fields("one"))
    with pytest.raises(UsageError, match="no key called 'two'; it has one"):
        remove_key(path, "two")
    with pytest.raises(UsageError, match="the new key, line 2: key 1: name: expected"):
        add_key(path, fields("a b"))
    with pytest.raises(UsageError, match="requests_per_minute: expected"):
        add_key(path, fields("two", requests_per_minute=0))
    assert path.read_text() == before


def test_a_file_that_is_wrong_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("[[keys]]\nname = 5\n")
    with pytest.raises(ConfigError, match="line 2"):
        add_key(path, fields("one"))
    with pytest.raises(ConfigError, match="line 2"):
        remove_key(path, "one")
    assert path.read_text() == "[[keys]]\nname = 5\n"
    with pytest.raises(ConfigError, match="cannot be opened"):
        add_key(tmp_path / "nowhere" / "keys.toml", fields("one"))


def test_tables_written_another_way_are_for_hands(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    inline = 'keys = [{{name = "one", hash = "sha256:{}"}}]\n'.format("0" * 64)
    path.write_text(inline)
    assert names(path) == ["one"]
    with pytest.raises(UsageError, match="by hand"):
        add_key(path, fields("two"))
    with pytest.raises(UsageError, match="by hand"):
        remove_key(path, "one")
    assert path.read_text() == inline


def test_a_text_that_looks_like_a_header_cannot_mislead(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    text = '[[keys]]\nname = "one"\nhash = "sha256:{}"\nmodels = ["""\n[[keys]]\n"""]\n'.format("0" * 64)
    path.write_text(text)
    add_key(path, fields("two"))
    with pytest.raises(UsageError, match="by hand"):
        remove_key(path, "two")
    assert names(path) == ["one", "two"]


def test_mode_and_links_stay_but_others_are_shut_out(tmp_path: Path) -> None:
    target, link = tmp_path / "real.toml", tmp_path / "keys.toml"
    add_key(target, fields("one"))
    target.chmod(0o666)
    link.symlink_to(target)
    add_key(link, fields("two"))
    assert link.is_symlink()
    assert names(target) == ["one", "two"]
    assert target.stat().st_mode & 0o777 == 0o640


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.toml"
    add_key(path, fields("one"))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(key_file_edit.os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot be changed: No space left"):
        add_key(path, fields("two"))
    assert names(path) == ["one"]
    assert os.listdir(tmp_path) == ["keys.toml"]


def test_one_editor_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "keys.toml"
    monkeypatch.setattr(key_file_edit, "_ATTEMPTS", 3)
    with key_file_edit._editing(path), pytest.raises(ConfigError, match="somebody else is changing"):
        add_key(path, fields("one"))
    add_key(path, fields("one"))
