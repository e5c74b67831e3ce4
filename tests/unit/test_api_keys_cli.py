"""`stator keys`: a key is shown once, its hash is kept."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from stator.frontend.key_file import read_keys
from stator.frontend.permit import Priority
from stator.testing.serve_process import run_stator

pytestmark = pytest.mark.timeout(60)


def stator(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    return run_stator("keys", *map(str, arguments), environment=environment)


def test_add_list_remove(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    limits = (
        "--rpm",
        60,
        "--tpm",
        1000,
        "--concurrent",
        4,
        "--models",
        "a, b*",
        "--priorities",
        "low",
        "--expires",
        "2030-01-31",
    )
    added = stator("add", "--file", path, "--name", "team-a", *limits)
    assert added.returncode == 0, added.stderr
    key = added.stdout.strip()
    assert re.fullmatch(r"sk-[0-9a-f]{64}", key)
    assert key not in added.stderr
    text = path.read_text()
    assert key not in text
    assert path.stat().st_mode & 0o777 == 0o600
    (record,) = read_keys(path)
    assert record.digest == hashlib.sha256(key.encode()).digest()
    assert (record.requests_per_minute, record.tokens_per_minute, record.concurrent_requests) == (60, 1000, 4)
    assert (record.models, record.priorities) == (("a", "b*"), (Priority.LOW,))

    listed = stator("list", STATOR_HTTP_API_KEYS_PATH=str(path))
    assert listed.returncode == 0, listed.stderr
    for shown in ("team-a", "60", "1000", "b*", "low", "2030-01-31"):
        assert shown in listed.stdout
    assert record.digest.hex()[:12] not in listed.stdout

    assert stator("remove", "--file", path, "--name", "team-a").returncode == 0
    assert read_keys(path) == []


def test_mistakes_are_one_line_and_status_2(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    nowhere = stator("list")
    assert nowhere.returncode == 2
    assert "give --file" in nowhere.stderr
    assert stator("list", "--file", path).returncode == 2
    unknown = stator("remove", "--file", path, "--name", "x")
    assert unknown.returncode == 2
    assert len(unknown.stderr.strip().splitlines()) == 1
    dated = stator("add", "--file", path, "--name", "x", "--expires", "2030-01-31T10:00:00")
    assert dated.returncode == 2
    assert not dated.stdout
    wrong = stator("add", "--file", path, "--name", "x y")
    assert wrong.returncode == 2
    assert "sk-" not in wrong.stdout
    assert not path.exists()
