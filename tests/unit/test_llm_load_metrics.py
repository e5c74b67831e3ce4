"""What the page says of the load of workers."""

from collections.abc import Mapping

from stator.llm.deployment import DeployedWorker
from stator.llm.kv_load import KvCapacity
from stator.llm.load_event import ActiveLoad, encode_load
from stator.llm.load_metrics import load_metrics
from stator.llm.monitor import Place, WorkerMonitor
from stator.llm.thresholds import LoadConfig
from stator.protocol.ids import EndpointId
from stator.telemetry import MetricSet
from stator.testing.frontend_kit import page_sample
from stator.testing.manual_clock import ManualClock

CHAT: Place = (EndpointId("blue", "backend", "generate"), "chat")


class Deaf:
    """Who serves a model and does not care who is busy."""

    workers: Mapping[int, DeployedWorker] = {255: DeployedWorker(capacity=KvCapacity(total_kv_blocks=10)), 7: DeployedWorker()}

    def set_busy(self, busy: Mapping[int, str]) -> None:
        pass


def test_each_rank_is_shown_as_long_as_it_is_known() -> None:
    monitor, page = WorkerMonitor(LoadConfig(active_decode_blocks_threshold=0.5), ManualClock()), MetricSet()
    monitor.follow({CHAT: Deaf()})

    def shown(name: str, rank: int = 0) -> float | None:
        text = page.exposition().decode()
        labels = f'{{dp_rank="{rank}",worker_id="255",worker_type="decode"}}'
        found = [line.rpartition(" ")[2] for line in text.splitlines() if line.startswith(name + labels)]
        return float(found[0]) if found else None

    with load_metrics(page, monitor):
        assert shown("stator_worker_kv_used_blocks") is None
        assert page_sample(page.exposition().decode(), "stator_busy_workers", model="chat") == 0.0
        monitor.hear(encode_load(ActiveLoad(worker_id=255, kv_used_blocks=6, active_decode_blocks=4)))
        assert shown("stator_worker_kv_used_blocks") == 6.0
        assert shown("dynamo_frontend_worker_active_decode_blocks") == 4.0
        assert shown("dynamo_frontend_worker_active_prefill_tokens") is None, "nobody said it"
        assert page_sample(page.exposition().decode(), "stator_busy_workers", model="chat") == 1.0
        monitor.hear(encode_load(ActiveLoad(worker_id=255, dp_rank=3, active_prefill_tokens=9)))
        assert shown("dynamo_frontend_worker_active_prefill_tokens", 3) == 9.0
        monitor.hear(b"nonsense")
        text = page.exposition().decode()
        counts = {outcome: page_sample(text, "stator_load_events_total", outcome=outcome) for outcome in ("heard", "malformed")}
        assert counts == {"heard": 2.0, "malformed": 1.0}
        monitor.follow({})
        assert shown("stator_worker_kv_used_blocks") is None and 'model="chat"' not in page.exposition().decode()
    assert page.exposition() == b""
