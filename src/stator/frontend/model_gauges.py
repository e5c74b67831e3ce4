"""What the page says of models and workers rather than of requests: their cards, and what each worker did last (`spec/30 §8`)."""

from collections.abc import Iterable

from stator.llm.card import WorkerType
from stator.llm.served import ServedModel
from stator.telemetry import Family, Gauge, MetricSet
from stator.telemetry.names import FRONTEND_PREFIX

__all__ = ["CardGauges", "LastSeen"]

_WORKER = ("worker_id", "dp_rank", "worker_type")
_NO_RANK = "none"


class CardGauges:
    """The limits that the card of each model states; absent where it states none. A model that is gone stays."""

    def __init__(self, page: MetricSet, prefix: str) -> None:
        def gauges(name: str, help: str) -> Family[Gauge]:
            return page.gauges(f"{prefix}_model_{name}", help, ("model",))

        self._context = gauges("context_length", "Maximum context length in tokens for a worker serving the model")
        self._block = gauges("kv_cache_block_size", "KV cache block size in tokens for a worker serving the model")
        self._migrations = gauges("migration_limit", "Maximum number of request migrations allowed for the model")
        self._blocks = gauges("total_kv_blocks", "Total KV cache blocks available for a worker serving the model")
        self._sequences = gauges("max_num_seqs", "Maximum number of sequences for a worker serving the model")
        self._batched = gauges("max_num_batched_tokens", "Maximum number of batched tokens for a worker serving the model")

    def show(self, models: Iterable[ServedModel]) -> None:
        """Bring the page up to date."""
        for served in models:
            card, runtime = served.card, served.card.runtime_config
            self._context.labels(served.name).set(card.context_length)
            self._block.labels(served.name).set(card.kv_cache_block_size)
            self._migrations.labels(served.name).set(card.migration_limit)
            for family, value in (
                (self._blocks, runtime.total_kv_blocks),
                (self._sequences, runtime.max_num_seqs),
                (self._batched, runtime.max_num_batched_tokens),
            ):
                if value is not None:
                    family.labels(served.name).set(value)


class LastSeen:
    """What was seen of each worker last: length of a prompt, times. `worker_id` is decimal, unlike in the component family."""

    def __init__(self, page: MetricSet) -> None:
        def gauges(name: str, help: str) -> Family[Gauge]:
            return page.gauges(f"{FRONTEND_PREFIX}_worker_last_{name}", help, _WORKER)

        self._input = gauges("input_sequence_tokens", "Last observed input sequence tokens per worker")
        self._ttft = gauges("time_to_first_token_seconds", "Last observed time to first token per worker (seconds)")
        self._gap = gauges("inter_token_latency_seconds", "Last observed inter-token latency per worker (seconds)")

    def first_token(self, instance: int, kind: WorkerType | None, *, prompt: int, seconds: float) -> None:
        """A worker answered a prompt of so many tokens after so long."""
        labels = _labels(instance, kind)
        self._input.labels(*labels).set(prompt)
        self._ttft.labels(*labels).set(seconds)

    def gap(self, instance: int, kind: WorkerType | None, seconds: float) -> None:
        """So long was it between two tokens of a worker."""
        self._gap.labels(*_labels(instance, kind)).set(seconds)

    def keep(self, instances: set[int]) -> None:
        """Forget all other workers."""
        alive = set(map(str, instances))
        for family in (self._input, self._ttft, self._gap):
            for labels, _ in family.series():
                if labels[0] not in alive:
                    family.remove(*labels)


def _labels(instance: int, kind: WorkerType | None) -> tuple[str, str, str]:
    """One that does everything is one that decodes, to routing."""
    alone = (WorkerType.PREFILL, WorkerType.ENCODE)
    return str(instance), _NO_RANK, kind.value if kind is not None and kind in alone else "decode"
