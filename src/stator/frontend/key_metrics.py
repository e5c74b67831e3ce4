"""What is counted per API key. Labels are the names in the file of keys, so that they are as many as it has, and gone with it."""

from collections.abc import Iterable

from stator.telemetry import Counter, MetricSet

__all__ = ["KeyCounters", "KeyMetrics"]

_REASONS = ("requests", "tokens", "concurrent", "model", "priority", "admin")


class KeyCounters:
    """The series of one key."""

    __slots__ = ("_metrics", "_name", "completion", "prompt", "requests")

    def __init__(self, metrics: "KeyMetrics", name: str) -> None:
        self._metrics = metrics
        self._name = name
        self.requests = metrics.requests.labels(name)
        self.prompt: Counter = metrics.tokens.labels(name, "prompt")
        self.completion: Counter = metrics.tokens.labels(name, "completion")

    def refused(self, reason: str) -> None:
        """A request was refused: one of the limits, or something the key does not allow."""
        self._metrics.refusals.labels(self._name, reason).inc()


class KeyMetrics:
    """Families of a frontend that asks for keys."""

    def __init__(self, page: MetricSet) -> None:
        self.requests = page.counters("stator_frontend_key_requests_total", "Requests let in, by API key", ("key",))
        self.refusals = page.counters(
            "stator_frontend_key_refusals_total", "Requests that a valid API key did not let in", ("key", "reason")
        )
        self.tokens = page.counters("stator_frontend_key_tokens_total", "Tokens, by API key", ("key", "kind"))
        self.failures = page.counters(
            "stator_frontend_key_failures_total", "Requests without an API key that is good now", ("reason",)
        )
        self.reloads = page.counters(
            "stator_frontend_key_reloads_total", "Readings of the changed file of API keys", ("outcome",)
        )
        self.keys = page.gauge("stator_frontend_keys", "API keys in force")

    def of(self, name: str) -> KeyCounters:
        """The series of the key called `name`."""
        return KeyCounters(self, name)

    def forget(self, names: Iterable[str]) -> None:
        """These keys are gone."""
        for name in names:
            self.requests.remove(name)
            for kind in ("prompt", "completion"):
                self.tokens.remove(name, kind)
            for reason in _REASONS:
                self.refusals.remove(name, reason)
