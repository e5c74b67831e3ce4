"""The file of API keys: what it may say, and how mistakes are told."""

import hashlib
import re
from pathlib import Path

import pytest

from stator.errors import ConfigError
from stator.frontend import key_metrics
from stator.frontend.key_file import KeyFileError, KeyRecord, parse_keys, permission_problem, read_keys
from stator.frontend.key_metrics import KeyMetrics
from stator.frontend.permit import Priority
from stator.telemetry import MetricSet

HASH = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32

WHOLE = f"""\
# ours
[[keys]]
name = "team-a"
hash = "{HASH}"
expires = 2030-01-01T00:00:00Z
models = ["llama-*", "qwen"]
priorities = ["normal", "low"]
requests_per_minute = 600
tokens_per_minute = 100_000
concurrent_requests = 16

[["keys"]]
hash = "{OTHER}"
name = "team-b"   # everything
admin = true
"""


def test_all_fields_and_none() -> None:
    first, second = parse_keys(WHOLE, "file")
    assert first == KeyRecord(
        name="team-a",
        digest=bytes.fromhex("ab" * 32),
        expires=1893456000.0,
        models=("llama-*", "qwen"),
        priorities=(Priority.NORMAL, Priority.LOW),
        requests_per_minute=600,
        tokens_per_minute=100_000,
        concurrent_requests=16,
    )
    assert second == KeyRecord(name="team-b", digest=bytes.fromhex("cd" * 32), admin=True)


def test_a_record_does_not_show_its_hash() -> None:
    (record, _) = parse_keys(WHOLE, "file")
    assert "abab" not in repr(record) + str(record) + f"{[record]}"
    assert record.digest.hex() not in repr(record)


def test_a_date_begins_at_midnight_of_greenwich() -> None:
    (record,) = parse_keys(f'[[keys]]\nname = "a"\nhash = "{HASH}"\nexpires = 2030-01-01\n', "file")
    assert record.expires == 1893456000.0


def test_no_keys_are_allowed_an_empty_file_is_not() -> None:
    assert parse_keys("# nobody yet\n", "file") == []
    for empty in ("", "\n \n"):
        with pytest.raises(KeyFileError, match="line 1: the file is empty"):
            parse_keys(empty, "file")


def broken(line: str, *, name: str = '"team-b"') -> str:
    """A file whose second key has `line` in line 8."""
    return f'[[keys]]\nname = "team-a"\nhash = "{OTHER}"\n\n[[keys]]\nname = {name}\nhash = "{HASH}"\n{line}\n'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rpm = 5", "key 'team-b': no field is called 'rpm'"),
        ("request_per_minute = 5", "did you mean requests_per_minute"),
        ("requests_per_minute = 0", "requests_per_minute: expected a whole number from 1"),
        ("requests_per_minute = -5", "from 1"),
        ("requests_per_minute = 1.5", "from 1"),
        ("requests_per_minute = true", "from 1"),
        ('tokens_per_minute = "many"', "tokens_per_minute: expected a whole number"),
        ("tokens_per_minute = 99999999999999999999", "from 1"),
        ("concurrent_requests = []", "from 1"),
        ('expires = "2030-01-01"', "without quotation marks"),
        ("expires = 2030-01-01T00:00:00", "needs a zone"),
        ("expires = 12:00:00", "expected a date"),
        ("models = []", "not empty"),
        ('models = "llama"', "expected a list"),
        ("models = [1]", "expected a list"),
        ('models = ["a*b"]', "elsewhere than at its end"),
        ('models = [""]', "empty"),
        ('priorities = ["urgent"]', "high, normal, low"),
        ("admin = 1", "expected true or false"),
        ("  admin  = 1", "expected true or false"),
        ('"admin" = 1', "expected true or false"),
        ("admin", "Expected '='"),
        ('x = "', "line 8"),
        ('name = "twice"', "Cannot overwrite"),
        ("x = " + "9" * 5000, "not valid TOML"),
        ("\\", "not valid TOML"),
    ],
)
def test_mistakes_are_told_with_their_line(line: str, expected: str) -> None:
    with pytest.raises(KeyFileError) as raised:
        parse_keys(broken(line), "keys.toml")
    message = raised.value.message
    assert message.startswith("keys.toml")
    assert expected in message
    assert "99" in line or "line 8" in message
    assert "abab" not in message


@pytest.mark.parametrize(
    "name", ['"sk-012345"', '""', '"a b"', '"ä"', '"-a"', '"' + "a" * 65 + '"', "5", '"a\\nb"', '"team/a"']
)
def test_names_are_short_plain_words_and_not_keys(name: str) -> None:
    with pytest.raises(KeyFileError, match="line 6: key 2: name: expected") as raised:
        parse_keys(broken("", name=name), "keys.toml")
    assert "012345" not in raised.value.message


def test_a_key_instead_of_its_hash_is_not_repeated() -> None:
    secret = "sk-" + "17" * 32
    for text in (
        f'[[keys]]\nname = "a"\nhash = "{secret}"\n',
        f'[[keys]]\nname = "{secret}"\nhash = "{HASH}"\n',
        f'[[keys]]\nname = "a"\n{secret} = "x"\n',
        f'{secret} = "x"\n',
        f"{secret}\n",
        f'[[keys]]\nname = "a"\nhash = "{HASH}"\nmodels = "{secret}"\n',
        f'[[keys]]\nname = "a"\nhash = "{HASH}"\nexpires = {secret}\n',
    ):
        with pytest.raises(KeyFileError) as raised:
            parse_keys(text, "keys.toml")
        assert "1717" not in f"{raised.value} {raised.value.__cause__!r}"
        assert "line" in raised.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f'[[keys]]\nhash = "{HASH}"\n', "line 1: key 1 has no name"),
        ('# x\n[[keys]]\nname = "a"\n', "line 2: key 'a' has no hash"),
        (f'[[keys]]\nname = "a"\nhash = "{HASH}"\n[[keys]]\nname = "a"\nhash = "{OTHER}"\n', "line 5: the same name as key 1"),
        (f'[[keys]]\nname = "a"\nhash = "{HASH}"\n[[keys]]\nname = "b"\nhash = "{HASH}"\n', "line 6: the same hash as key 1"),
        ('[key]\nname = "a"\n', "line 1: nothing here is called 'key'"),
        ("keys = 5\n", "line 1: keys are written as tables"),
        ("\nkeys = [5]\n", "line 2: keys are written as tables"),
        ('[keys]\nname = "a"\n', "line 1: keys are written as tables"),
        ("keys = " + "[" * 100_000, "not valid TOML"),
    ],
)
def test_what_is_missing_twice_or_elsewhere(text: str, expected: str) -> None:
    with pytest.raises(KeyFileError) as raised:
        parse_keys(text, "keys.toml")
    assert expected in raised.value.message


def test_every_beginning_of_a_file_is_read_or_refused_with_a_reason() -> None:
    for length in range(len(WHOLE)):
        try:
            records = parse_keys(WHOLE[:length], "keys.toml")
        except KeyFileError as error:
            assert "keys.toml" in error.message
        else:
            assert len(records) < 2 or length > WHOLE.index("admin") - 20


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    with pytest.raises(ConfigError, match=r"keys\.toml cannot be read: No such file"):
        read_keys(path)
    path.write_bytes(WHOLE.encode())
    assert len(read_keys(path)) == 2
    path.write_bytes(b"# a\n# \xff\n")
    with pytest.raises(KeyFileError, match="line 2: the text is not UTF-8"):
        read_keys(path)
    path.write_bytes(b"#" * (8 * 2**20 + 1))
    with pytest.raises(KeyFileError, match="larger than"):
        read_keys(path)


@pytest.mark.parametrize(
    ("mode", "fine"), [(0o600, True), (0o640, True), (0o400, True), (0o644, False), (0o660, False), (0o602, False)]
)
def test_a_file_that_others_may_read_or_change(tmp_path: Path, mode: int, fine: bool) -> None:
    path = tmp_path / "keys.toml"
    path.touch()
    path.chmod(mode)
    problem = permission_problem(path)
    assert (problem == "") is fine
    assert fine or f"{mode:04o}" in problem


def test_documented_hash_command() -> None:
    """`printf %s "$KEY" | sha256sum` gives what the file wants."""
    digest = hashlib.sha256(b"any key of enough randomness").hexdigest()
    (record,) = parse_keys(f'[[keys]]\nname = "a"\nhash = "sha256:{digest}"\n', "file")
    assert record.digest.hex() == digest


PAGE = (Path(__file__).parents[2] / "docs" / "api-keys.md").read_text("utf-8")


def test_the_documented_file_is_one() -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)
    (record,) = parse_keys(re.sub(r"sha256:\w+…", HASH, block), "docs/api-keys.md")
    assert all(getattr(record, field) is not None for field in KeyRecord.__struct_fields__)
    assert (record.name, record.admin) == ("team-a", False)


def test_the_documented_metrics_are_those_there_are() -> None:
    page = MetricSet()
    counters = KeyMetrics(page).of("name")
    documented = set(re.findall(r"`(stator_frontend_key\w+)", PAGE))
    assert {name for name, _ in page._entries} == documented
    for reason in re.findall(r"refused to a good key: (.*?) \|", PAGE)[0].replace("`", "").split(", "):
        assert reason in key_metrics._REASONS
        counters.refused(reason)
