"""Keys in force: found, expired, replaced, and told of in the log once in a while."""

import hashlib
import logging

import pytest
from multidict import CIMultiDict

from stator.frontend.errors import Rejected
from stator.frontend.key_file import KeyRecord
from stator.frontend.key_metrics import KeyMetrics
from stator.frontend.key_ring import KeyRing
from stator.telemetry import MetricSet
from stator.testing.frontend_kit import page_sample
from stator.testing.manual_clock import ManualClock

SECRET = "sk-very-secret"


def record(name: str, key: str, **more: object) -> KeyRecord:
    return KeyRecord(name=name, digest=hashlib.sha256(key.encode()).digest(), **more)  # type: ignore[arg-type]  # passed through


class Bench:
    def __init__(self, *records: KeyRecord) -> None:
        self.clock = ManualClock()
        self.page = MetricSet()
        self.ring = KeyRing(None, clock=self.clock, shares=1, metrics=KeyMetrics(self.page))  # type: ignore[arg-type]  # unread
        self.ring.install(records)

    def sample(self, name: str, **labels: str) -> float:
        return page_sample(self.page.exposition().decode(), name, **labels)

    def name(self, key: str) -> str:
        return self.ring.account_of(CIMultiDict({"Authorization": f"Bearer {key}"}), "192.0.2.1").name

    def refusal(self, headers: dict[str, str]) -> str:
        with pytest.raises(Rejected) as raised:
            self.ring.account_of(CIMultiDict(headers), "192.0.2.1")
        failure = raised.value.failure
        assert failure.status == 401
        assert dict(failure.headers)["WWW-Authenticate"] == "Bearer"
        assert SECRET not in failure.message
        return failure.code or ""


def test_a_key_is_taken_from_where_clients_put_it() -> None:
    bench = Bench(record("team", SECRET))
    for headers in (
        {"Authorization": f"Bearer {SECRET}"},
        {"authorization": f"bearer  {SECRET} "},
        {"api-key": SECRET},
        {"X-API-Key": SECRET},
    ):
        assert bench.ring.account_of(CIMultiDict(headers), "").name == "team"


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"Authorization": ""}, "missing_api_key"),
        ({"Authorization": "Bearer "}, "missing_api_key"),
        ({"Authorization": f"Bearer {SECRET}x"}, "invalid_api_key"),
        ({"Authorization": f"Basic {SECRET}"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {SECRET.upper()}"}, "invalid_api_key"),
        ({"Authorization": "Bearer \udcff"}, "invalid_api_key"),
        ({"Authorization": f"Bearer {SECRET * 10_000}"}, "invalid_api_key"),
        ({"Authorization": "Bearer wrong", "api-key": SECRET}, "invalid_api_key"),
    ],
)
def test_others_are_refused_and_counted(headers: dict[str, str], code: str) -> None:
    bench = Bench(record("team", SECRET))
    assert bench.refusal(headers) == code
    assert bench.sample("stator_frontend_key_failures_total", reason=code.removesuffix("_api_key")) == 1


def test_a_key_ends_when_it_says() -> None:
    bench = Bench(record("team", SECRET, expires=1_700_000_010.0))
    assert bench.name(SECRET) == "team"
    bench.clock.advance(9.9)
    assert bench.name(SECRET) == "team"
    bench.clock.advance(0.2)
    assert bench.refusal({"api-key": SECRET}) == "expired_api_key"


def test_a_new_set_of_keys_keeps_what_was_used_and_forgets_who_is_gone() -> None:
    bench = Bench(record("stays", "one", requests_per_minute=10), record("goes", "two", requests_per_minute=10))
    stays, goes = (bench.ring.account_of({"api-key": key}, "") for key in ("one", "two"))
    grant, running = stays.begin(bench.clock.monotonic()), goes.begin(bench.clock.monotonic())
    assert bench.sample("stator_frontend_keys") == 2
    assert bench.ring.install([record("stays", "new", requests_per_minute=20), record("comes", "three")]) == 1
    assert bench.name("new") == "stays"
    assert bench.name("three") == "comes"
    for gone in ("one", "two"):
        assert bench.refusal({"api-key": gone}) == "invalid_api_key"
    assert bench.ring.account_of({"api-key": "new"}, "") is stays
    assert stays.headers(bench.clock.monotonic())["x-ratelimit-remaining-requests"] == "19"
    assert 'key="goes"' not in bench.page.exposition().decode()
    running.generated(5, bench.clock.monotonic())  # what runs goes on
    running.end(bench.clock.monotonic(), for_nothing=False)
    grant.end(bench.clock.monotonic(), for_nothing=False)


def test_wrong_keys_are_one_line_in_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    bench = Bench(record("team", "right"))
    for _ in range(1000):
        bench.refusal({"api-key": SECRET})
    bench.refusal({})
    bench.clock.advance(10.1)
    bench.refusal({"api-key": SECRET})
    first, second = (record.getMessage() for record in caplog.records)
    assert "1 invalid; the last one from 192.0.2.1" in first
    assert "1000 invalid, 1 missing" in second
    assert SECRET not in caplog.text
    assert bench.sample("stator_frontend_key_failures_total", reason="invalid") == 1001
