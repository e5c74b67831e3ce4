"""What the frontend counts (`spec/30 §8.1`): names, labels and buckets are the reference's. Tokens are counted once per flush."""

from typing import Any

from stator.telemetry import Counter, Family, Gauge, Histogram, MetricRegistry

__all__ = ["FrontendMetrics", "RequestMeter"]

UNKNOWN_MODEL = "unknown_model"
"""label of requests for a model that is not served: names from outside must not make series"""

_DURATION = (0, 2, 4, 8, 16, 32, 64, 130, 260, 510)
_INPUT = (0, 100, 210, 430, 870, 1800, 3600, 7400, 15000, 31000, 63000, 130000)
_OUTPUT = (0, 100, 210, 430, 880, 1800, 3700, 7600, 16000, 32000)
_TTFT = (0, 0.0022, 0.0047, 0.01, 0.022, 0.047, 0.1, 0.22, 0.47, 1, 2.2, 4.7, 10, 22, 48, 100, 220, 480)
_ITL = (0, 0.0019, 0.0035, 0.0067, 0.013, 0.024, 0.045, 0.084, 0.16, 0.3, 0.56, 1.1, 2)
_STAGE = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5)


class _ModelMeter:
    """The series of one model."""

    __slots__ = ("active", "cached", "duration", "gap", "inflight", "input", "output", "queued", "tokens", "ttft")

    def __init__(self, metrics: "FrontendMetrics", model: str) -> None:
        self.active = metrics.active.labels(model)
        self.inflight = metrics.inflight.labels(model)
        self.queued = metrics.queued.labels(model)
        self.duration = metrics.duration.labels(model)
        self.input = metrics.input_tokens.labels(model)
        self.cached = metrics.cached_tokens.labels(model)
        self.output = metrics.output_sequence.labels(model)
        self.tokens = metrics.output_tokens.labels(model)
        self.ttft = metrics.ttft.labels(model)
        self.gap = metrics.gap.labels(model)


class FrontendMetrics:
    """All families, declared in `registry`, whose whole page `/metrics` shows. `prefix` replaces the reference's."""

    def __init__(self, registry: MetricRegistry, *, prefix: str = "dynamo_frontend") -> None:
        self.registry = registry
        self._prefix = prefix
        self._models: dict[str, _ModelMeter] = {}
        request = ("model", "endpoint", "request_type")
        self.started = self._counters(
            "requests_started", "Total number of LLM requests accepted by the frontend handler", *request
        )
        self.requests = self._counters("requests", "Total number of LLM requests processed", *request, "status", "error_type")
        self.cancelled = self._counters("model_cancellation", "Total number of requests cancelled by their clients", *request)
        self.rejected = self._counters("model_rejection", "Total number of requests refused as overloaded", "model", "endpoint")
        self.output_tokens = self._counters("output_tokens", "Total number of output tokens", "model")
        self.active = self._gauges("active_requests", "Number of active requests")
        self.inflight = self._gauges("inflight_requests", "Number of inflight requests")
        self.queued = self._gauges("queued_requests", "Number of requests in HTTP processing queue")
        self.disconnected = registry.gauge(f"{prefix}_disconnected_clients", "Number of disconnected clients")
        self.duration = self._histograms("request_duration_seconds", "Duration of LLM requests", _DURATION)
        self.input_tokens = self._histograms("input_sequence_tokens", "Input sequence length in tokens", _INPUT)
        self.cached_tokens = self._histograms("cached_tokens", "Prompt tokens found in the KV cache", _INPUT)
        self.output_sequence = self._histograms("output_sequence_tokens", "Output sequence length in tokens", _OUTPUT)
        self.ttft = self._histograms("time_to_first_token_seconds", "Time to first token in seconds", _TTFT)
        self.gap = self._histograms("inter_token_latency_seconds", "Inter-token latency in seconds", _ITL)
        # Always under this prefix (`spec/30 §8.2`).
        name, text = "dynamo_frontend_stage_duration_seconds", "Duration of the stages of a request"
        self.preprocess = registry.histograms(name, text, ("stage",), _STAGE).labels("preprocess")

    def _counters(self, name: str, text: str, *labels: str) -> Family[Counter]:
        return self.registry.counters(f"{self._prefix}_{name}_total", text, labels)

    def _gauges(self, name: str, text: str) -> Family[Gauge]:
        return self.registry.gauges(f"{self._prefix}_{name}", text, ("model",))

    def _histograms(self, name: str, text: str, bounds: tuple[float, ...]) -> Family[Histogram]:
        return self.registry.histograms(f"{self._prefix}_{name}", text, ("model",), bounds)

    def begin(self, *, model: str, endpoint: str, stream: bool, now: float) -> "RequestMeter":
        """Count a request that arrived. `model` is the name of a served model, or "" if it is not."""
        name = model or UNKNOWN_MODEL
        meter = self._models.get(name)
        if meter is None:
            meter = self._models[name] = _ModelMeter(self, name)
        return RequestMeter(self, meter, labels=(name, endpoint, "stream" if stream else "unary"), now=now)


class RequestMeter:
    """One request's share. `first_token` and `last_token` are clock readings, 0.0 until there was a token."""

    __slots__ = ("_begin", "_labels", "_metrics", "_model", "_waiting", "first_token", "last_token", "output_tokens")

    def __init__(self, metrics: FrontendMetrics, model: _ModelMeter, *, labels: tuple[str, str, str], now: float) -> None:
        self._metrics = metrics
        self._model = model
        self._labels = labels
        self._begin = now
        self._waiting = True
        self.first_token = 0.0
        self.last_token = 0.0
        self.output_tokens = 0
        metrics.started.labels(*labels).inc()
        model.active.inc()
        model.inflight.inc()
        model.queued.inc()

    def prompt(self, tokens: int, seconds: float) -> None:
        """The prompt is ready for the worker: its length, and how long preparing it took."""
        self._model.input.observe(tokens)
        self._metrics.preprocess.observe(seconds)

    def flush(self, tokens: int, now: float) -> None:
        """`tokens` new tokens arrived together. The gap since the flush before is shared evenly among them."""
        if tokens <= 0:
            return
        model = self._model
        model.tokens.value += tokens
        self.output_tokens += tokens
        if self._waiting:
            self._waiting = False
            model.queued.dec()
            model.ttft.observe(now - self._begin)
            self.first_token = self.last_token = now
            return
        gap = now - self.last_token
        self.last_token = now
        model.gap.observe(gap / tokens, tokens)

    def cached(self, tokens: int) -> None:
        """How many prompt tokens the worker found in its cache."""
        self._model.cached.observe(tokens)

    def end(self, *, error_type: str, now: float) -> None:
        """The answer is complete, or failed for the reason `error_type` ("" for none). Call it once."""
        model = self._model
        model.active.dec()
        model.inflight.dec()
        if self._waiting:
            model.queued.dec()
        model.duration.observe(now - self._begin)
        model.output.observe(self.output_tokens)
        self._metrics.requests.labels(*self._labels, "error" if error_type else "success", error_type).inc()
        if error_type == "cancelled":
            self._metrics.cancelled.labels(*self._labels).inc()
            self._metrics.disconnected.inc()
        elif error_type == "overload":
            self._metrics.rejected.labels(*self._labels[:2]).inc()

    def summary(self, now: float) -> dict[str, Any]:
        """For the log: counts of tokens, times in milliseconds (absent before the first token)."""
        values: dict[str, Any] = {"output_tokens": self.output_tokens}
        if self.first_token:
            values["ttft_ms"] = round((self.first_token - self._begin) * 1e3, 2)
        values["duration_ms"] = round((now - self._begin) * 1e3, 2)
        return values
