"""What the frontend counts (`spec/30 §8.1, §8.2`): names, labels, buckets and helps are the reference's."""

from collections.abc import Callable, Iterable

from stator.clock import Clock
from stator.frontend.admission_metrics import AdmissionMetrics
from stator.frontend.model_gauges import CardGauges, LastSeen
from stator.llm.card import WorkerType
from stator.llm.prompt_timing import PromptTiming
from stator.llm.served import ServedModel
from stator.telemetry import Counter, Family, Gauge, Histogram, LoopDelay, MetricSet
from stator.telemetry.names import FRONTEND_PREFIX, frontend_prefix

__all__ = ["UNKNOWN_MODEL", "FrontendMetrics", "RequestMeter"]

UNKNOWN_MODEL = "unknown_model"
"""label of requests for a model that is not served: names from outside must not make series"""

_DURATION = (0, 2, 4, 8, 16, 32, 64, 130, 260, 510)
_INPUT = (0, 100, 210, 430, 870, 1800, 3600, 7400, 15000, 31000, 63000, 130000)
_OUTPUT = (0, 100, 210, 430, 880, 1800, 3700, 7600, 16000, 32000)
_TTFT = (0, 0.0022, 0.0047, 0.01, 0.022, 0.047, 0.1, 0.22, 0.47, 1, 2.2, 4.7, 10, 22, 48, 100, 220, 480)
_ITL = (0, 0.0019, 0.0035, 0.0067, 0.013, 0.024, 0.045, 0.084, 0.16, 0.3, 0.56, 1.1, 2)
_STAGE = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5)
_TOKENIZE = (0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1)
_TEMPLATE = (0.00001, 0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.01, 0.05)
_TOKENIZER_MS = (0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class _ModelSeries:
    """The series of one model. Those of its answers are on the page once it was asked something valid."""

    __slots__ = (
        "_metrics",
        "_name",
        "active",
        "cached",
        "duration",
        "gap",
        "inflight",
        "input",
        "output",
        "queued",
        "tokens",
        "ttft",
    )

    cached: Histogram
    gap: Histogram
    input: Histogram
    output: Histogram
    tokens: Counter
    ttft: Histogram

    def __init__(self, metrics: "FrontendMetrics", name: str) -> None:
        self._metrics = metrics
        self._name = name
        self.active = metrics.active.labels(name)
        self.inflight = metrics.inflight.labels(name)
        self.queued = metrics.queued.labels(name)
        self.duration = metrics.duration.labels(name)

    def open(self) -> None:
        """A request was found valid."""
        metrics, name = self._metrics, self._name
        self.input = metrics.input_tokens.labels(name)
        self.cached = metrics.cached_tokens.labels(name)
        self.output = metrics.output_sequence.labels(name)
        self.tokens = metrics.output_tokens.labels(name)
        self.ttft = metrics.ttft.labels(name)
        self.gap = metrics.gap.labels(name)


class FrontendMetrics:
    """All families, registered in `page`, which `/metrics` shows. `prefix` replaces the reference's, made fit for names.

    What else belongs on the page is appended to it: `page.on_exposition`.
    """

    def __init__(self, page: MetricSet, clock: Clock, *, prefix: str = FRONTEND_PREFIX) -> None:
        self.page = page
        self._prefix = prefix = frontend_prefix(prefix)
        self._models: dict[str, _ModelSeries] = {}
        self.loop_delay = LoopDelay(page, clock, prefix=FRONTEND_PREFIX)
        self._requests()
        self._tokens()
        self._stages()
        self._cards = CardGauges(page, prefix)
        self.last = LastSeen(page)
        self.admission = AdmissionMetrics(page)

    def _requests(self) -> None:
        request = ("model", "endpoint", "request_type")
        self.started = self._counters(
            "requests_started", "Total number of LLM requests accepted by the frontend handler", *request
        )
        self.requests = self._counters("requests", "Total number of LLM requests processed", *request, "status", "error_type")
        self.cancelled = self._counters("model_cancellation", "Total number of request cancellations", *request)
        self.rejected = self._counters(
            "model_rejection", "Total number of requests rejected due to resource exhaustion", "model", "endpoint"
        )
        self.active = self._gauges(
            "active_requests",
            "Number of requests currently being handled by the frontend, from HTTP handler entry to response completion",
        )
        self.inflight = self._gauges("inflight_requests", "Number of inflight requests")
        self.queued = self._gauges("queued_requests", "Number of requests in HTTP processing queue")
        self.disconnected = self.page.gauge(f"{self._prefix}_disconnected_clients", "Number of disconnected clients")
        self.duration = self._histograms("request_duration_seconds", "Duration of LLM requests", _DURATION)

    def _tokens(self) -> None:
        self.output_tokens = self._counters(
            "output_tokens", "Total number of output tokens generated (updates in real-time)", "model"
        )
        self.input_tokens = self._histograms("input_sequence_tokens", "Input sequence length in tokens", _INPUT)
        self.cached_tokens = self._histograms(
            "cached_tokens", "Number of cached tokens (prefix cache hits) per request", _INPUT
        )
        self.output_sequence = self._histograms("output_sequence_tokens", "Output sequence length in tokens", _OUTPUT)
        self.ttft = self._histograms("time_to_first_token_seconds", "Time to first token in seconds", _TTFT)
        self.gap = self._histograms("inter_token_latency_seconds", "Inter-token latency in seconds", _ITL)

    def _stages(self) -> None:
        """Most of them are always under the reference's own prefix (`spec/30 §8.2`)."""
        page, own = self.page, FRONTEND_PREFIX
        self.stage_requests = page.gauges(
            f"{own}_stage_requests", "Number of requests currently in the given pipeline stage", ("stage", "phase")
        )
        self.stage_duration = page.histograms(
            f"{own}_stage_duration_seconds", "Pipeline stage duration (seconds)", ("stage",), _STAGE
        )
        self.tokenize = page.histogram(f"{own}_tokenize_seconds", "Tokenization time in preprocessor (seconds)", _TOKENIZE)
        self.template = page.histogram(
            f"{own}_template_seconds", "Template application time in preprocessor (seconds)", _TEMPLATE
        )
        self.detokenize_us = page.counter(f"{own}_detokenize_total_us", "Cumulative detokenization time (microseconds)")
        self.detokenize_tokens = page.counter(f"{own}_detokenize_token_count", "Total tokens detokenized")
        self.tokenizer_ms = page.histograms(
            f"{self._prefix}_tokenizer_latency_ms", "Tokenizer latency in milliseconds", ("operation",), _TOKENIZER_MS
        )

    def _counters(self, name: str, text: str, *labels: str) -> Family[Counter]:
        return self.page.counters(f"{self._prefix}_{name}_total", text, labels)

    def _gauges(self, name: str, text: str) -> Family[Gauge]:
        return self.page.gauges(f"{self._prefix}_{name}", text, ("model",))

    def _histograms(self, name: str, text: str, bounds: tuple[float, ...]) -> Family[Histogram]:
        return self.page.histograms(f"{self._prefix}_{name}", text, ("model",), bounds)

    def follow(self, models: Callable[[], Iterable[ServedModel]]) -> None:
        """Show what `models` say of their cards, and forget workers that are gone; asked at each scrape."""

        def update() -> None:
            served = list(models())
            self._cards.show(served)
            self.last.keep({instance for each in served for instance in each.instances()})

        self.page.on_update(update)

    def begin(self, *, model: str, endpoint: str, stream: bool, now: float) -> "RequestMeter":
        """Count a request that arrived. `model` is the name of a served model, or "" if it is not."""
        name = model or UNKNOWN_MODEL
        series = self._models.get(name)
        if series is None:
            series = self._models[name] = _ModelSeries(self, name)
        return RequestMeter(self, series, labels=(name, endpoint, "stream" if stream else "unary"), now=now)


class RequestMeter:
    """One request's share. `first_token` and `last_token` are clock readings, 0.0 until there was a token."""

    __slots__ = (
        "_begin",
        "_gap",
        "_labels",
        "_metrics",
        "_model",
        "_waiting",
        "_worker",
        "first_token",
        "input_tokens",
        "last_token",
        "on_tokens",
        "output_tokens",
    )

    def __init__(self, metrics: FrontendMetrics, model: _ModelSeries, *, labels: tuple[str, str, str], now: float) -> None:
        self._metrics = metrics
        self._model = model
        self._labels = labels
        self._begin = now
        self._waiting = True
        self._worker: tuple[int, WorkerType | None] = (0, None)
        self._gap = 0.0
        self.on_tokens: Callable[[int, float], None] | None = None
        """told of each flush: how many tokens, and when"""
        self.first_token = 0.0
        self.last_token = 0.0
        self.input_tokens = 0
        self.output_tokens = 0
        metrics.started.labels(*labels).inc()
        model.active.inc()
        model.inflight.inc()
        model.queued.inc()

    def preparing(self) -> Gauge:
        """To be entered while the prompt is made ready for the worker."""
        return self._metrics.stage_requests.labels("preprocess", "")

    def prompt(self, tokens: int, seconds: float, timing: PromptTiming) -> None:
        """The prompt is ready: its length, and how long preparing it took."""
        metrics = self._metrics
        self._model.open()
        self.input_tokens = tokens
        self._model.input.observe(tokens)
        metrics.stage_duration.labels("preprocess").observe(seconds)
        if timing.template is not None:
            metrics.template.observe(timing.template)
        if timing.tokenize is not None:
            metrics.tokenize.observe(timing.tokenize)
            metrics.tokenizer_ms.labels("tokenize").observe(timing.tokenize * 1e3)

    def answered(self, instance: int, kind: WorkerType | None, seconds: float) -> None:
        """The first items came from this worker, so long after the request was sent; `instance` 0 is nobody known."""
        self._worker = (instance, kind)
        self._metrics.stage_duration.labels("transport_roundtrip").observe(seconds)

    def flush(self, tokens: int, now: float) -> None:
        """`tokens` new tokens arrived together. The gap since the flush before is shared evenly among them; there is none between
        those of the first flush. An answer has one gap less than tokens.
        """
        if tokens <= 0:
            return
        model = self._model
        model.tokens.value += tokens
        self.output_tokens += tokens
        if self.on_tokens is not None:
            self.on_tokens(tokens, now)
        if self._waiting:
            self._waiting = False
            model.queued.dec()
            model.ttft.observe(now - self._begin)
            self.first_token = self.last_token = now
            if self._worker[0]:
                self._metrics.last.first_token(*self._worker, prompt=self.input_tokens, seconds=now - self._begin)
            if tokens > 1:
                model.gap.observe(0.0, tokens - 1)
            return
        gap = (now - self.last_token) / tokens
        self.last_token = now
        self._gap = gap
        model.gap.observe(gap, tokens)

    def detokenized(self, tokens: int, seconds: float) -> None:
        """Tokens became text, in so long altogether."""
        metrics = self._metrics
        metrics.detokenize_us.value += int(seconds * 1e6)
        metrics.detokenize_tokens.value += tokens
        metrics.tokenizer_ms.labels("detokenize").observe(seconds * 1e3)

    def cached(self, tokens: int) -> None:
        """How many prompt tokens the worker found in its cache."""
        self._model.cached.observe(tokens)

    def end(self, *, error_type: str, now: float) -> None:
        """The answer is complete, or failed for the reason `error_type` ("" for none). Call it once."""
        model, metrics = self._model, self._metrics
        model.active.dec()
        model.inflight.dec()
        if self._waiting:
            model.queued.dec()
        else:
            model.output.observe(self.output_tokens)
        if self._gap and self._worker[0]:
            metrics.last.gap(*self._worker, self._gap)
        model.duration.observe(now - self._begin)
        metrics.requests.labels(*self._labels, "error" if error_type else "success", error_type).inc()
        if error_type == "cancelled":
            metrics.cancelled.labels(*self._labels).inc()
            metrics.disconnected.inc()
        elif error_type == "overload":
            metrics.rejected.labels(*self._labels[:2]).inc()

    def summary(self, now: float) -> dict[str, int | float]:
        """For the log: counts of tokens, times in milliseconds; what is not known is absent."""
        values: dict[str, int | float] = {}
        if self.input_tokens:
            values["input_tokens"] = self.input_tokens
        values["output_tokens"] = self.output_tokens
        if self.first_token:
            values["ttft_ms"] = round((self.first_token - self._begin) * 1e3, 3)
            if self.output_tokens > 1:
                values["avg_itl_ms"] = round((self.last_token - self.first_token) / (self.output_tokens - 1) * 1e3, 3)
        values["duration_ms"] = round((now - self._begin) * 1e3, 3)
        return values
