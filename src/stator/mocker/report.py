"""What came out of a simulation: times per request, use per worker, and the figures the reference's replay reports."""

import math
from collections.abc import Mapping

import msgspec

__all__ = ["RequestTimes", "Simulation", "WorkerUsage"]

_MILLISECOND = 1_000_000
_SECOND = 1_000_000_000
_QUANTILES = {"median": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}


class RequestTimes(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One request. Times in nanoseconds from the beginning; -1: it did not come to that."""

    number: int
    """its place among the arrivals"""
    worker: int
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    """of the prompt, found in the prefix cache"""
    preemptions: int
    rejected: bool
    arrived_at: int
    admitted_at: int
    first_token_at: int
    ended_at: int

    @property
    def finished(self) -> bool:
        """Whether it has all its tokens."""
        return self.ended_at >= 0 and not self.rejected

    @property
    def ttft(self) -> int:
        """Nanoseconds to the first token."""
        return self.first_token_at - self.arrived_at

    @property
    def itl(self) -> float:
        """Mean nanoseconds between two tokens; 0 with one token."""
        return (self.ended_at - self.first_token_at) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0

    @property
    def latency(self) -> int:
        """Nanoseconds to the last token."""
        return self.ended_at - self.arrived_at


class WorkerUsage(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One worker's totals; times in nanoseconds."""

    requests: int
    """admitted"""
    rejected: int
    preemptions: int
    passes: int
    tokens: int
    """generated"""
    computed_tokens: int
    """of prompts"""
    busy: int
    used_time: int
    """block-nanoseconds"""
    most_used: int
    """blocks"""
    capacity: int
    """blocks"""
    hit_rate: float | None

    @property
    def mean_usage(self) -> float:
        """Share of the blocks in use, over the time there were passes: 0 … 1."""
        return self.used_time / (self.busy * self.capacity) if self.busy else 0.0


class Simulation(msgspec.Struct, frozen=True, kw_only=True):
    """A finished simulation. `gaps` says how often each time between two tokens of a request occurred, in nanoseconds."""

    requests: list[RequestTimes]
    workers: list[WorkerUsage]
    gaps: dict[int, int]
    ended_at: int
    digest: str
    """hash of all that happened, as hex digits"""

    @property
    def tokens(self) -> int:
        """Tokens generated."""
        return sum(worker.tokens for worker in self.workers)

    def report(self) -> dict[str, float]:
        """Figures by the names of the reference's report (`spec/50 §24`), over the requests that finished; times in milliseconds.

        Those of `itl` count each token, not each request.
        """
        done = [request for request in self.requests if request.finished]
        figures: dict[str, float] = {
            "num_requests": len(self.requests),
            "completed_requests": len(done),
            "total_input_tokens": sum(request.prompt_tokens for request in done),
            "total_output_tokens": sum(request.output_tokens for request in done),
        }
        if not done:
            return figures
        duration = max(request.ended_at for request in done) - min(request.arrived_at for request in self.requests)
        cached = sum(request.cached_tokens for request in done)
        figures["duration_ms"] = duration / _MILLISECOND
        figures["prefix_cache_reused_ratio"] = cached / figures["total_input_tokens"]
        if duration:
            figures["request_throughput_rps"] = len(done) * _SECOND / duration
            figures["output_throughput_tok_s"] = figures["total_output_tokens"] * _SECOND / duration
        figures |= _spread("ttft", _counted([request.ttft for request in done]))
        figures |= _spread("e2e_latency", _counted([request.latency for request in done]))
        figures |= _spread("tpot", _counted([request.itl for request in done if request.output_tokens > 1]))
        figures |= _spread("itl", self.gaps)
        return figures


def _counted(values: list[int] | list[float]) -> dict[float, int]:
    counts: dict[float, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    return counts


def _spread(name: str, counts: Mapping[float, int] | Mapping[int, int]) -> dict[str, float]:
    """Mean, deviation, extremes and quantiles of values in nanoseconds, `counts[value]` of each."""
    total = sum(counts.values())
    if not total:
        return {}
    ordered = sorted(counts.items())
    mean = sum(value * count for value, count in ordered) / total
    deviation = math.sqrt(sum(count * (value - mean) ** 2 for value, count in ordered) / total)
    figures: dict[str, float] = {"mean": mean, "std": deviation, "min": ordered[0][0], "max": ordered[-1][0]}
    for quantile, share in _QUANTILES.items():
        figures[quantile] = _quantile(ordered, share * (total - 1))
    return {f"{key}_{name}_ms": value / _MILLISECOND for key, value in figures.items()}


def _quantile(ordered: list[tuple[float, int]] | list[tuple[int, int]], place: float) -> float:
    """The value nearest to `place`, counted from 0; of two equally near ones the larger."""
    left = math.floor(place + 0.5)
    for value, count in ordered:
        if left < count:
            return value
        left -= count
    return ordered[-1][0]
