"""Log lines: formats, levels per target, secrets, and input that wants to break a line."""

import io
import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from stator.config import Secret
from stator.errors import ConfigError
from stator.settings import load
from stator.telemetry import LogConfig, configure_logging, parse_levels


class Output:
    """The log of the process, sent to a string."""

    def __init__(self) -> None:
        self.stream = io.StringIO()
        self.undo: list[Any] = []

    def configure(self, config: LogConfig, *secrets: Secret | None) -> None:
        self.undo.append(configure_logging(config, stream=self.stream, secrets=secrets))

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()


@pytest.fixture
def output() -> Iterator[Output]:
    found = Output()
    yield found
    for undo in reversed(found.undo):
        undo()


def test_text_lines_read_like_the_references(output: Output) -> None:
    output.configure(LogConfig())
    logging.getLogger("stator.demo").info(
        "request received", extra={"request_id": "r-1", "component": "my backend", "count": 3, "ok": True}
    )
    time, _, rest = output.lines[0].partition(" ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", time)
    assert rest == ' INFO stator.demo: request received request_id=r-1 component="my backend" count=3 ok=true'


def test_json_lines_have_the_references_order(output: Output) -> None:
    output.configure(LogConfig(log_format="json"))
    logging.getLogger("stator.demo").warning(
        "%s of %d", "one", 2, extra={"z": 1, "a": "x", "id": 2**64 - 1, "huge": 2**70, "none": None}
    )
    line = json.loads(output.lines[0])
    assert list(line) == ["time", "level", "file", "line", "target", "message", "a", "huge", "id", "none", "z"]
    assert (line["level"], line["target"], line["message"]) == ("WARN", "stator.demo", "one of 2")
    assert (line["id"], line["huge"], line["none"]) == (2**64 - 1, str(2**70), None)
    assert line["file"].endswith("test_telemetry_logs.py")


def test_tracebacks_follow_in_both_formats(output: Output) -> None:
    for form in ("text", "json"):
        output.configure(load(LogConfig, {"log_format": form}, env={}))
        try:
            raise ValueError("boom")
        except ValueError:
            logging.getLogger("stator.demo").exception("failed")
    text = output.stream.getvalue()
    assert "ERROR stator.demo: failed\nTraceback (most recent call last):" in text
    assert "ValueError: boom" in json.loads(output.lines[-1])["exception"]


def test_local_time_carries_its_offset(output: Output) -> None:
    output.configure(LogConfig(log_local_time=True))
    logging.getLogger("stator.demo").info("x")
    assert re.match(r"\S+\.\d{6}[+-]\d\d:\d\d ", output.lines[0])


def test_levels_are_per_target(output: Output) -> None:
    output.configure(LogConfig(log="warn,stator.transports=debug,stator.transports.tcp=off,stator.fine=trace"))
    for target, level, word in (
        ("stator.runtime", logging.INFO, "no"),
        ("stator.runtime", logging.WARNING, "yes"),
        ("stator.transports.native", logging.DEBUG, "yes"),
        ("stator.transports.native", 5, "no"),
        ("stator.transports.tcp", logging.CRITICAL, "no"),
        ("stator.fine.grained", 5, "yes"),
        ("httpx", logging.WARNING, "no"),
        ("httpx", logging.ERROR, "yes"),
    ):
        logging.getLogger(target).log(level, word)
    assert [line.rsplit(": ")[1] for line in output.lines] == ["yes"] * 4
    assert "TRACE stator.fine.grained" in output.lines[2]


def test_undo_restores_what_was_there() -> None:
    root = logging.getLogger()
    before = list(root.handlers), root.level, logging.getLogger("httpx").level
    undo = configure_logging(LogConfig(log="off"), stream=io.StringIO())
    assert list(root.handlers) != before[0]
    undo()
    assert (list(root.handlers), root.level, logging.getLogger("httpx").level) == before


def test_warnings_go_to_the_log(output: Output) -> None:
    output.configure(LogConfig())
    assert logging.getLogger("py.warnings").isEnabledFor(logging.WARNING)


def test_parse_levels() -> None:
    assert parse_levels("") == {"": 20}
    assert parse_levels(" DEBUG ") == {"": 10}
    assert parse_levels("a::b=error, info ,c.d=off") == {"": 20, "a.b": 40, "c.d": 100}
    for text in ("loud", "stator.transports", "stator=loud", "=info"):
        with pytest.raises(ConfigError, match="expected a level or target=level"):
            parse_levels(text)


def test_our_variable_is_strict_and_the_references_is_as_there() -> None:
    with pytest.raises(ConfigError, match="log level 'dynamo_runtime'"):
        load(LogConfig, env={"STATOR_LOG": "dynamo_runtime"})
    assert parse_levels(load(LogConfig, env={"DYN_LOG": "dynamo_runtime"}).log) == {"": 100, "dynamo_runtime": 5}
    assert parse_levels(load(LogConfig, env={"DYN_LOG": "warn,dynamo_runtime::pipeline=info"}).log) == {
        "": 30,
        "dynamo_runtime.pipeline": 20,
    }
    assert load(LogConfig, env={"DYN_LOG": "a=loud"}).log == "info"
    assert load(LogConfig, env={"DYN_LOGGING_JSONL": "true"}).log_format == "json"
    assert load(LogConfig, env={"DYN_LOGGING_JSONL": "0"}).log_format == "text"


def test_secrets_are_never_in_a_line(output: Output) -> None:
    secret = Secret("swordfish-42")
    for form in ("text", "json"):
        output.configure(load(LogConfig, {"log_format": form}, env={}), secret, None, Secret("abc"))
        logger = logging.getLogger("stator.demo")
        logger.info("config %s", LogConfig())
        logger.info("secret %s %r", secret, secret, extra={"key": secret, "url": "http://u:swordfish-42@h"})
        try:
            raise RuntimeError("login with swordfish-42 failed: abc")
        except RuntimeError:
            logger.exception("library error")
    text = output.stream.getvalue()
    assert "swordfish" not in text and "***" in text
    assert "failed: abc" in text, "very short secrets are not looked for"


@pytest.mark.parametrize("form", ["text", "json"])
def test_nothing_a_peer_sends_breaks_a_line(output: Output, form: str) -> None:
    class Hostile:
        def __str__(self) -> str:
            raise RuntimeError("no")

    output.configure(load(LogConfig, {"log_format": form}, env={}))
    logger = logging.getLogger("stator.demo")
    logger.info("a\nERROR fake\x1b[31m \ud800", extra={"v": "x\ny", "w": Hostile(), "b": b"\xff", "s": "\udfff"})
    logger.info("%d apples", "no")
    logger.info("x" * 100_000)
    assert len(output.lines) == 3
    assert "\x1b" not in output.stream.getvalue()
    assert "<Hostile>" in output.lines[0]
    assert "%d apples (TypeError while formatting)" in output.lines[1]
    assert "… (83616 more characters)" in output.lines[2]


def test_color_only_where_it_is_wanted(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    output.configure(LogConfig())
    logging.getLogger("stator.demo").error("red")
    assert "\x1b[31mERROR\x1b[0m stator.demo: red" in output.lines[0]
