"""What one key may do, on a clock that stands still."""

import pytest

from stator.frontend.caller import caller_of
from stator.frontend.errors import Rejected
from stator.frontend.key_account import KeyAccount
from stator.frontend.key_file import KeyRecord
from stator.frontend.key_metrics import KeyMetrics
from stator.frontend.permit import Priority
from stator.telemetry import MetricSet
from stator.testing.frontend_kit import page_sample

NOW = 1000.0


class Bench:
    """An account and its numbers."""

    def __init__(self, *, shares: int = 1, **limits: object) -> None:
        self.page = MetricSet()
        record = KeyRecord(name="team", digest=bytes(32), **limits)  # type: ignore[arg-type]  # passed through
        self.account = KeyAccount(record, shares=shares, counters=KeyMetrics(self.page).of("team"), now=NOW)

    def sample(self, name: str, **labels: str) -> float:
        return page_sample(self.page.exposition().decode(), f"stator_frontend_key_{name}", key="team", **labels)

    def refusal(self, now: float = NOW) -> Rejected:
        with pytest.raises(Rejected) as raised:
            self.account.begin(now)
        return raised.value


def test_without_limits_everything_goes() -> None:
    bench = Bench()
    grants = [bench.account.begin(NOW) for _ in range(1000)]
    grants[0].prompt(10**9, NOW)
    assert bench.account.headers(NOW) == {}
    assert bench.sample("requests_total") == 1000
    assert bench.sample("tokens_total", kind="prompt") == 10**9


def test_requests_per_minute() -> None:
    bench = Bench(requests_per_minute=2)
    for _ in range(2):
        bench.account.begin(NOW).end(NOW, for_nothing=False)
    failure = bench.refusal().failure
    assert (failure.status, failure.code, failure.type) == (429, "rate_limit_exceeded", "requests")
    assert failure.retry
    assert failure.retry_after == 30
    assert dict(failure.headers)["retry-after-ms"] == "30001"
    assert "`team`" in failure.message
    assert "2 requests per minute" in failure.message
    assert bench.sample("refusals_total", reason="requests") == 1
    assert bench.account.headers(NOW)["x-ratelimit-remaining-requests"] == "0"
    bench.account.begin(NOW + 30.001)


def test_requests_at_one_time_are_counted_to_their_end() -> None:
    bench = Bench(concurrent_requests=2)
    first, _ = bench.account.begin(NOW), bench.account.begin(NOW)
    assert "2 requests at one time" in bench.refusal().failure.message
    first.end(NOW, for_nothing=False)
    bench.account.begin(NOW)
    assert bench.sample("refusals_total", reason="concurrent") == 1


def test_prompts_are_taken_before_and_answers_as_they_come() -> None:
    bench = Bench(tokens_per_minute=600)
    grant = bench.account.begin(NOW)
    grant.prompt(100, NOW)
    assert bench.account.headers(NOW)["x-ratelimit-remaining-tokens"] == "500"
    grant.generated(30, NOW)
    assert bench.account.headers(NOW)["x-ratelimit-remaining-tokens"] == "470"
    assert bench.account.headers(NOW + 1)["x-ratelimit-remaining-tokens"] == "480"
    assert bench.sample("tokens_total", kind="completion") == 30


def test_an_answer_may_overdraw_once_and_nothing_begins_until_that_is_paid_back() -> None:
    bench = Bench(tokens_per_minute=600)
    grant = bench.account.begin(NOW)
    grant.prompt(600, NOW)
    grant.generated(300, NOW)  # nothing is left, and it goes on
    failure = bench.refusal().failure
    assert (failure.type, failure.retry_after) == ("tokens", 31)
    assert bench.account.headers(NOW)["x-ratelimit-reset-tokens"] == "1m30s"
    bench.refusal(NOW + 29.9)
    bench.account.begin(NOW + 31)


def test_a_prompt_that_does_not_fit_now_is_told_when() -> None:
    bench = Bench(tokens_per_minute=600)
    bench.account.begin(NOW).prompt(400, NOW)
    with pytest.raises(Rejected) as raised:
        bench.account.begin(NOW).prompt(300, NOW)
    assert raised.value.failure.retry_after == 10
    assert "the prompt has 300" in raised.value.failure.message
    assert bench.account.headers(NOW)["x-ratelimit-remaining-tokens"] == "200"


def test_a_prompt_that_never_fits_is_told_so() -> None:
    bench = Bench(tokens_per_minute=600)
    with pytest.raises(Rejected) as raised:
        bench.account.begin(NOW).prompt(601, NOW)
    failure = raised.value.failure
    assert (failure.status, failure.retry) == (429, False)
    assert dict(failure.headers) == {"x-should-retry": "false"}
    assert "ever" in failure.message


def test_what_we_refuse_costs_nothing() -> None:
    bench = Bench(tokens_per_minute=600, requests_per_minute=10, concurrent_requests=1)
    full = bench.account.headers(NOW)
    grant = bench.account.begin(NOW)
    grant.prompt(100, NOW)
    grant.end(NOW, for_nothing=True)
    assert bench.account.headers(NOW) == full
    grant = bench.account.begin(NOW)
    grant.prompt(100, NOW)
    grant.generated(1, NOW)
    grant.end(NOW, for_nothing=True)  # it got something: that counts
    assert bench.account.headers(NOW)["x-ratelimit-remaining-tokens"] == "499"
    assert bench.account.headers(NOW)["x-ratelimit-remaining-requests"] == "9"
    bench.account.begin(NOW)


def test_each_of_several_frontends_gives_its_part() -> None:
    bench = Bench(shares=4, requests_per_minute=8, tokens_per_minute=400, concurrent_requests=8)
    grants = [bench.account.begin(NOW) for _ in range(2)]
    assert "8 (at each of 4 frontends its part of it) requests at one time" in bench.refusal().failure.message
    for grant in grants:
        grant.end(NOW, for_nothing=False)
    assert "requests per minute" in bench.refusal().failure.message
    assert bench.account.headers(NOW)["x-ratelimit-limit-tokens"] == "100"
    few = Bench(shares=4, concurrent_requests=2, requests_per_minute=1)
    few.account.begin(NOW)
    assert "at one time" in few.refusal().failure.message


def test_other_limits_from_now_on() -> None:
    bench = Bench(requests_per_minute=1)
    grant = bench.account.begin(NOW)
    bench.account.change(KeyRecord(name="team", digest=bytes(32), tokens_per_minute=60), NOW)
    grant.prompt(60, NOW)
    grant.generated(5, NOW)
    assert bench.refusal().failure.type == "tokens"
    bench.account.change(KeyRecord(name="team", digest=bytes(32)), NOW)
    grant.generated(5, NOW)
    bench.account.begin(NOW)


@pytest.mark.parametrize(
    ("models", "allowed", "refused"),
    [
        (None, ["anything"], []),
        (("llama",), ["llama"], ["llama-3", "Llama", ""]),
        (("llama-*", "qwen"), ["llama-", "llama-3", "qwen"], ["llama", "qwen-2"]),
        (("*",), ["", "x"], []),
    ],
)
def test_models(models: tuple[str, ...] | None, allowed: list[str], refused: list[str]) -> None:
    bench = Bench(models=models)
    for model in allowed:
        bench.account.check_model(model)
    for model in refused:
        with pytest.raises(Rejected) as raised:
            bench.account.check_model(model)
        failure = raised.value.failure
        assert (failure.status, failure.param, failure.code) == (403, "model", "model_not_allowed")
    assert bench.sample("refusals_total", reason="model") == len(refused)


def caller(bench: Bench, header: str | None = None, tier: str | None = None, *, priorities: bool = True) -> Priority:
    headers = {} if header is None else {"x-stator-priority": header}
    found = caller_of(headers, tier, salt=b"", priorities=priorities, account=bench.account)
    assert found.tenant == "team"
    return found.priority


def test_a_key_says_which_priorities_its_requests_may_have() -> None:
    free = Bench()
    assert caller(free) is Priority.NORMAL
    assert caller(free, "high") is Priority.HIGH
    assert caller(free, tier="flex") is Priority.LOW
    batch = Bench(priorities=(Priority.LOW, Priority.NORMAL))
    assert caller(batch) is Priority.LOW
    assert caller(batch, "normal") is Priority.NORMAL
    assert caller(batch, tier="priority") is Priority.LOW  # asked for politely: it gets what there is
    assert caller(batch, "normal", priorities=False) is Priority.LOW
    with pytest.raises(Rejected) as raised:
        caller(batch, "high")
    assert (raised.value.failure.status, raised.value.failure.code) == (403, "priority_not_allowed")
    assert batch.sample("refusals_total", reason="priority") == 1
