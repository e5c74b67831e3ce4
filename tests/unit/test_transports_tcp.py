"""The parts of the compatible plane that need no socket: addresses, headers, settings."""

import pytest

from stator import settings
from stator.errors import ConfigError, ConnectFailed
from stator.protocol.envelope import RequestEnvelope
from stator.transports.tcp.address import InstanceAddress
from stator.transports.tcp.config import TcpConfig
from stator.transports.tcp.headers import read_deadline, request_headers

# -- addresses


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("192.0.2.2:46439/12d4/generate", InstanceAddress("192.0.2.2", 46439, "12d4/generate")),
        ("tcp://192.0.2.2:46439/12d4/generate", InstanceAddress("192.0.2.2", 46439, "12d4/generate")),
        ("10.0.0.1:1/fea5/demo/backend/generate", InstanceAddress("10.0.0.1", 1, "fea5/demo/backend/generate")),
        ("[::1]:5/1/e", InstanceAddress("::1", 5, "1/e")),
    ],
)
def test_instance_addresses(text: str, expected: InstanceAddress) -> None:
    assert InstanceAddress.parse(text, instance=1) == expected


@pytest.mark.parametrize(
    "text", ["", "192.0.2.2:46439", "192.0.2.2:46439/", "192.0.2.2/1/e", "192.0.2.2:0/1/e", "http://a:1/x"]
)
def test_what_is_no_instance_address_is_a_failure_to_connect(text: str) -> None:
    with pytest.raises(ConnectFailed) as caught:
        InstanceAddress.parse(text, instance=7)
    assert (caught.value.instance, caught.value.phase) == (7, "connect")


# -- headers


def test_headers_of_a_request() -> None:
    envelope = RequestEnvelope(
        id="r", payload=b"1", headers={"traceparent": "t", "x-request-id": "x", "baggage": "b"}, deadline=1.5
    )
    headers = request_headers("1/e", envelope, wall=1_795_234_940.5)
    assert headers == {
        "x-endpoint-path": "1/e",
        "request-id": "r",
        "x-frontend-send-ts-ns": "1795234940500000000",
        "traceparent": "t",
        "x-request-id": "x",
        "x-stator-deadline": "1.500",
    }
    assert read_deadline(headers) == 1.5


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "-1", "0"])
def test_a_deadline_that_is_none(text: str) -> None:
    assert read_deadline({"x-stator-deadline": text}) is None
    assert read_deadline({}) is None


# -- settings


def test_the_reference_s_variables() -> None:
    env = {
        "DYN_TCP_RPC_PORT": "7001",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        "DYN_TCP_MAX_MESSAGE_SIZE": "5000000",
        "DYN_REQUEST_PLANE_CODEC": "msgpack",
        "DYN_TCP_CHANNEL_BUFFER": "9",
        "DYN_TCP_POOL_SIZE": "2",
        "DYN_TCP_REQUEST_TIMEOUT": "7",
    }
    config = settings.load(TcpConfig, env=env)
    assert (config.port, config.call_home_host, config.max_message_size) == (7001, "127.0.0.1", 5_000_000)
    assert config.codec == "msgpack"
    assert (config.pipeline, config.pool_size, config.request_timeout) == (9, 2, 7.0)


def test_bad_values_do_what_the_reference_does() -> None:
    config = settings.load(TcpConfig, env={"DYN_TCP_RPC_PORT": "many", "DYN_REQUEST_PLANE_CODEC": "JSON"})
    assert (config.port, config.codec) == (0, "json")
    with pytest.raises(ConfigError, match=r"Interface not found: 127\.0\.0\.1"):
        settings.load(TcpConfig, env={"DYN_TCP_RESPONSE_STREAM_HOST": "127.0.0.1"})
