"""Settings of the HTTP/2 plane, the reference's names among them."""

import pytest

from stator import settings
from stator.errors import ConfigError
from stator.transports.http2 import Http2Config
from stator.transports.http2.limits import look_every, session_limits

REFERENCE = {
    "DYN_HTTP_RPC_HOST": ("127.0.0.1", "host", "127.0.0.1"),
    "DYN_HTTP_RPC_PORT": ("8888", "port", 8888),
    "DYN_HTTP_RPC_ROOT_PATH": ("/rpc", "root_path", "/rpc"),
    "DYN_HTTP_REQUEST_TIMEOUT": ("7", "request_timeout", 7.0),
    "DYN_HTTP2_MAX_FRAME_SIZE": ("65536", "max_frame", 65_536),
    "DYN_HTTP2_MAX_CONCURRENT_STREAMS": ("10", "max_streams", 10),
    "DYN_HTTP2_POOL_MAX_IDLE_PER_HOST": ("3", "pool_size", 3),
    "DYN_HTTP2_POOL_IDLE_TIMEOUT_SECS": ("60", "idle_timeout", 60.0),
    "DYN_HTTP2_KEEP_ALIVE_INTERVAL_SECS": ("5", "keep_alive_interval", 5.0),
    "DYN_HTTP2_KEEP_ALIVE_TIMEOUT_SECS": ("2", "keep_alive_timeout", 2.0),
}


@pytest.mark.parametrize("name", REFERENCE)
def test_the_references_variables_are_read(name: str) -> None:
    text, field, value = REFERENCE[name]
    assert getattr(settings.load(Http2Config, env={name: text}), field) == value


def test_ours_go_first() -> None:
    config = settings.load(Http2Config, env={"STATOR_HTTP2_PORT": "1", "DYN_HTTP_RPC_PORT": "2", "STATOR_HTTP2_WINDOW": "1MiB"})
    assert (config.port, config.window) == (1, 2**20)


@pytest.mark.parametrize("root", ["", "v1", "/v1/", "/", "/a b", "/a?b", "/a#b", "/ü", "/a%20b"])
def test_a_root_that_is_no_path_is_refused(root: str) -> None:
    with pytest.raises(ConfigError, match=r"http2\.root_path"):
        Http2Config(root_path=root)


def test_a_worker_is_more_patient_than_a_caller() -> None:
    config = Http2Config(idle_timeout=30.0)
    assert session_limits(config, worker=True).idle > session_limits(config, worker=False).idle == 30.0


def test_short_limits_are_looked_at_often() -> None:
    assert look_every(session_limits(Http2Config(), worker=False)) == 1.0
    assert look_every(session_limits(Http2Config(keep_alive_timeout=0.3), worker=False)) == pytest.approx(0.1)
