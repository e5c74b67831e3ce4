"""The answers of a NATS micro service (`spec/10 §6`)."""

import json

import pytest

from stator.transports.nats.service import Service, ServiceEndpoint

pytestmark = pytest.mark.timeout(10)


@pytest.fixture
def service() -> Service:
    service = Service(namespace="demo", component="backend", id="ID", version="1.2.3", started="2026-01-01T00:00:00Z")
    service.endpoints["demo_backend.generate-1f"] = ServiceEndpoint(
        name="demo_backend-generate-1f", subject="demo_backend.generate-1f", queue_group="q"
    )
    return service


COMMON = {"name": "demo_backend", "id": "ID", "version": "1.2.3"}
NAMED = {"name": "demo_backend-generate-1f", "subject": "demo_backend.generate-1f", "queue_group": "q"}


def test_ping(service: Service) -> None:
    assert json.loads(service.answer("PING")) == {"type": "io.nats.micro.v1.ping_response", **COMMON, "metadata": {}}


def test_info(service: Service) -> None:
    assert json.loads(service.answer("INFO")) == {
        "type": "io.nats.micro.v1.info_response",
        **COMMON,
        "metadata": {},
        "description": "Dynamo component backend in namespace demo",
        "endpoints": [{**NAMED, "metadata": {}}],
    }


def test_statistics(service: Service) -> None:
    nothing = {"num_requests": 0, "num_errors": 0, "last_error": "", "processing_time": 0, "average_processing_time": 0}
    expected = {"type": "io.nats.micro.v1.stats_response", **COMMON, "started": "2026-01-01T00:00:00Z"}
    assert json.loads(service.answer("STATS")) == {**expected, "endpoints": [{**NAMED, **nothing}]}
    endpoint = service.endpoints["demo_backend.generate-1f"]
    endpoint.count("", 100)
    endpoint.count("Server overloaded: worker at capacity", 201)
    counted = {"num_requests": 2, "num_errors": 1, "processing_time": 301, "average_processing_time": 150}
    counted["last_error"] = "Server overloaded: worker at capacity"  # type: ignore[assignment]
    assert json.loads(service.answer("STATS"))["endpoints"] == [{**NAMED, **counted}]


def test_where_it_is_asked(service: Service) -> None:
    assert service.subjects("PING") == ("$SRV.PING", "$SRV.PING.demo_backend", "$SRV.PING.demo_backend.ID")
