"""Which telemetry settings do nothing, and that somebody is told."""

import builtins
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from stator.errors import ConfigError
from stator.settings import load
from stator.telemetry import LogConfig, TraceConfig, configure_tracing
from stator.telemetry.tracing import active_sink, without_effect

OFF = "spans are exported with OTEL_EXPORT_ENABLED=true"


def test_what_is_not_set_is_not_complained_about() -> None:
    assert without_effect(TraceConfig(), LogConfig()) == []
    assert without_effect(load(TraceConfig, env={}), load(LogConfig, env={})) == []
    exporting = TraceConfig(export=True, traces_endpoint="http://c:4318/x", service_name="s", sample_ratio=0.5)
    assert without_effect(exporting, LogConfig(log_format="json")) == []


@pytest.mark.parametrize(
    ("env", "name", "reason"),
    [
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "OTEL_EXPORTER_OTLP_ENDPOINT", OFF),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", OFF),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, "OTEL_EXPORTER_OTLP_PROTOCOL", OFF),
        ({"OTEL_SERVICE_NAME": "mine"}, "OTEL_SERVICE_NAME", OFF),
        ({"OTEL_TRACES_SAMPLE_RATIO": "0"}, "OTEL_TRACES_SAMPLE_RATIO", OFF),
        (
            {"OTEL_EXPORT_ENABLED": "1", "OTEL_EXPORTER_OTLP_ENDPOINT": "a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "b"},
            "OTEL_EXPORTER_OTLP_ENDPOINT",
            "beside OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        ),
        ({"OTEL_EXPORT_ENABLED": "1", "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT": "a"}, "OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "stderr"),
        ({"DYN_LOGGING_SPAN_EVENTS": "1"}, "DYN_LOGGING_SPAN_EVENTS", "and would need DYN_LOGGING_JSONL"),
        ({"DYN_LOGGING_SPAN_EVENTS": "1", "DYN_LOGGING_JSONL": "1"}, "DYN_LOGGING_SPAN_EVENTS", "effect: the line"),
        ({"DYN_LOGGING_CONFIG_PATH": "/etc/x.toml"}, "DYN_LOGGING_CONFIG_PATH", "STATOR_LOG"),
    ],
)
def test_each_setting_without_effect_is_named(env: dict[str, str], name: str, reason: str) -> None:
    (text,) = without_effect(load(TraceConfig, env=env), load(LogConfig, env=env))
    assert text.startswith(f"{name} has no effect")
    assert reason in text


def test_the_warnings_are_loud(caplog: pytest.LogCaptureFixture) -> None:
    configure_tracing(TraceConfig(service_name="x"), LogConfig(log_config_path=Path("x")))()
    levels = [(record.levelno, record.getMessage().split()[0]) for record in caplog.records]
    assert levels == [(logging.WARNING, "OTEL_SERVICE_NAME"), (logging.WARNING, "DYN_LOGGING_CONFIG_PATH")]
    configure_tracing(TraceConfig(service_name="x"), LogConfig(), warn=False)()
    assert len(caplog.messages) == 2


def test_without_the_extra_export_is_off_and_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any, **named: Any) -> Any:
        if name.startswith("opentelemetry"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *arguments, **named)

    monkeypatch.delitem(sys.modules, "stator.telemetry.otel", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    configure_tracing(TraceConfig(export=True), LogConfig())()
    assert active_sink() is None
    (text,) = caplog.messages
    assert "OTEL_EXPORT_ENABLED has no effect" in text and "pip install 'stator[otel]'" in text


def test_grpc_without_its_exporter_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.grpc.trace_exporter", None)
    configure_tracing(TraceConfig(export=True, protocol="grpc"), LogConfig())()
    assert active_sink() is None
    (text,) = caplog.messages
    assert "pip install opentelemetry-exporter-otlp-proto-grpc" in text


def test_an_endpoint_that_is_none_is_an_error() -> None:
    with pytest.raises(ConfigError, match="expected http://host:port"):
        configure_tracing(TraceConfig(export=True, endpoint="collector:4317"), LogConfig())
    assert active_sink() is None


def test_bad_values_are_ignored_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    env = {"OTEL_TRACES_SAMPLE_RATIO": "2", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/json"}
    config = load(TraceConfig, env=env)
    assert (config.sample_ratio, config.protocol) == (None, None)
    assert len(caplog.messages) == 2
