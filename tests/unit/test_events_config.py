"""What event planes can be told, and what channels may be called."""

import pytest

from stator.errors import ConfigError, UsageError
from stator.events import Channel, EventHost, EventsConfig
from stator.events.zmq_config import Brokers, ZmqEventsConfig
from stator.protocol.event_frame import MAX_ENVELOPE
from stator.settings import load
from stator.transports.nats.config import NatsConfig, shown_url

pytestmark = pytest.mark.timeout(10)


def test_a_channels_subject_is_the_references() -> None:
    assert Channel(namespace="nsx", topic="kv_metrics").subject == "namespace.nsx.kv_metrics"
    component = Channel(namespace="nsx", component="backend", topic="kv-events")
    assert (component.prefix, component.subject) == (
        "namespace.nsx.component.backend",
        "namespace.nsx.component.backend.kv-events",
    )


@pytest.mark.parametrize(
    ("namespace", "component", "topic"),
    [
        ("", "", "t"),
        ("n", "", ""),
        ("n/m", "", "t"),
        ("n", "c/d", "t"),
        ("n", "", "t/u"),
        ("n", "", "t\n"),
        ("n\ud800", "", "t"),
    ],
)
def test_a_channel_that_cannot_be(namespace: str, component: str, topic: str) -> None:
    with pytest.raises(UsageError, match="event channel"):
        Channel(namespace=namespace, component=component, topic=topic)


def test_the_references_variables_are_read() -> None:
    env = {
        "DYN_ZMQ_EVENT_SUBSCRIBER_CHANNEL_CAPACITY": "77",
        "DYN_ZMQ_BROKER_URL": "xsub=tcp://broker:5555, xpub=tcp://broker:5556",
        "NATS_SERVER": "nats://one:4222,nats://two:4222",
    }
    assert load(EventsConfig, env=env).queue_capacity == 77
    assert load(ZmqEventsConfig, env=env).brokers == Brokers(xsub=("tcp://broker:5555",), xpub=("tcp://broker:5556",))
    assert load(NatsConfig, env=env).urls == ["nats://one:4222", "nats://two:4222"]
    assert load(ZmqEventsConfig, env={}).brokers is None
    assert load(NatsConfig, env={}).urls == ["nats://127.0.0.1:4222"]


def test_what_is_read_holds_what_may_be_sent() -> None:
    assert EventsConfig().max_payload == MAX_ENVELOPE
    assert EventHost.max_envelope.fget is not None


def test_several_brokers() -> None:
    config = ZmqEventsConfig(broker=" xpub = tcp://b:2;tcp://[::1]:4 ,xsub=tcp://a:1;tcp://a:3; ")
    assert config.brokers == Brokers(xsub=("tcp://a:1", "tcp://a:3"), xpub=("tcp://b:2", "tcp://[::1]:4"))


@pytest.mark.parametrize(
    "text",
    [
        "tcp://a:1",
        "xsub=tcp://a:1",
        "xsub=, xpub=tcp://a:1",
        "xsub=tcp://a:1, xpub=a:1",
        "xsub=tcp://a:1, xpub=tcp://b:2, x=tcp://c:3",
    ],
)
def test_brokers_that_make_no_sense(text: str) -> None:
    with pytest.raises(ConfigError, match=r"DYN_ZMQ_BROKER_URL.*xsub=tcp://host:port"):
        ZmqEventsConfig(broker=text)


def test_a_server_needs_no_scheme() -> None:
    assert NatsConfig(servers=("one:4222", "tls://two")).urls == ["nats://one:4222", "tls://two"]


@pytest.mark.parametrize(
    "url", ["http://a:1", "nats://", "nats://a:port", "nats://user:secret@:4222", "nats://user:secret@a:99999"]
)
def test_a_server_that_makes_no_sense(url: str) -> None:
    with pytest.raises(ConfigError, match="NATS_SERVER") as caught:
        NatsConfig(servers=(url,))
    assert "secret" not in str(caught.value)


def test_some_server_is_needed() -> None:
    with pytest.raises(ConfigError, match="at least one"):
        NatsConfig(servers=())


@pytest.mark.parametrize("config", [ZmqEventsConfig, NatsConfig])
def test_waits_that_contradict_each_other(config: type[ZmqEventsConfig] | type[NatsConfig]) -> None:
    with pytest.raises(ConfigError, match="reconnect_most"):
        config(reconnect_first=2.0, reconnect_most=1.0)


def test_what_is_shown_of_an_address() -> None:
    assert shown_url("nats://user:pass@host:1") == "nats://host:1"
    assert shown_url("nats://host:1") == "nats://host:1"
    assert shown_url("host:1") == "host:1"
