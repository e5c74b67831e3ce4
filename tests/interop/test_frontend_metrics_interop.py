"""The page of a frontend of the reference and of ours, after the same requests to the same worker: same families, labels, counts."""

import asyncio
import json
import urllib.error
import urllib.request
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from interop.peers import discovery_root, needs_reference
from interop.test_card_interop import frontend as reference_frontend
from interop.test_card_interop import running, wait_for
from stator.frontend import FrontendConfig, FrontendMetrics, FrontendServer, create_app
from stator.llm.card import card_from_directory
from stator.llm.directory import ModelDirectory
from stator.llm.model_files import load_tokenizer
from stator.runtime import Runtime
from stator.tasks import SystemClock
from stator.telemetry import MetricSet
from stator.testing.frontend_kit import RawClient
from stator.testing.tiny_tokenizers import build_model_directory

pytestmark = [pytest.mark.interop, pytest.mark.timeout(120), needs_reference]

WORKER = """
import asyncio, sys
from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

async def generate(request, context):
    held = len(request["token_ids"]) > 40
    for number in range(1 if held else 3):
        await asyncio.sleep(0.01)  # tokens that arrive together have no time between them
        yield {"token_ids": [int(sys.argv[2])], "finish_reason": "length" if number == 2 else None}
    while held and not context.is_stopped():
        await asyncio.sleep(0.02)

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    endpoint = runtime.endpoint("demo.backend.generate")
    config = ModelRuntimeConfig()
    config.total_kv_blocks, config.max_num_seqs, config.max_num_batched_tokens = 100, 7, 512
    await register_model(
        ModelInput.Tokens, ModelType.Chat | ModelType.Completions, endpoint, sys.argv[1], "tiny",
        kv_cache_block_size=16, runtime_config=config, worker_type=WorkerType.Aggregated,
    )
    await endpoint.serve_endpoint(generate)

asyncio.run(main())
"""

NOT_OURS = {
    "dynamo_tokio_": "the executor of the reference's language",
    "dynamo_router_": "costs of KV-aware routing, which comes later",
    "dynamo_component_router_": "the KV router's own counts, which come later",
    "dynamo_frontend_lora_": "no LoRA placement here",
    "dynamo_frontend_tokenizer_cache_": "prompts are tokenised as a whole: there is no cache to hit or miss",
}
"""families that only the reference has, by what they begin with"""

NOT_THEIRS = {
    "stator_": "our own counts, under our own name",
}
"""families that only we have, by what they begin with"""

OTHER_COUNTS = {
    "dynamo_frontend_detokenize_token_count": "the reference also counts tokens of the prompt that it decodes for context",
    "dynamo_frontend_stage_duration_seconds": "completions are prepared, too; choosing a worker is part of sending: no `route`",
    "dynamo_frontend_tokenize_seconds": "the reference times the prompts of chats only",
    "dynamo_transport_tcp_bytes_sent": "ids and addresses differ in length",
    "dynamo_frontend_detokenize_total_us": "a time",
    "dynamo_frontend_event_loop_delay_seconds": "a time",
    "dynamo_frontend_event_loop_stall": "a time",
    "dynamo_frontend_worker_last_time_to_first_token_seconds": "a time",
    "dynamo_frontend_worker_last_inter_token_latency_seconds": "a time",
    "dynamo_component_uptime_seconds": "a time",
}
"""families of both that count otherwise, and why"""

OTHER_HELP = {
    "dynamo_frontend_event_loop_delay_seconds": "our sleep is longer, so that it costs less, and the text says how long it is",
}
"""families of both that explain themselves otherwise, and why"""

TIMED = ("_sum", "_bucket")
"""samples that are times, or fall where times do"""


class Request(NamedTuple):
    path: str
    body: dict[str, Any]


def chat(text: str, **more: Any) -> Request:
    return Request("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": text}], **more})


TRAFFIC = (
    chat("hello"),
    chat("hello", stream=True),
    Request("/v1/completions", {"model": "tiny", "prompt": "hello"}),
    Request("/v1/completions", {"model": "tiny", "prompt": "hello", "stream": True}),
    Request("/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}),
    Request("/v1/chat/completions", {"model": "tiny", "messages": []}),
)
STATUS = (200, 200, 200, 200, 404, 400)


def post(url: str, request: Request) -> int:
    """Send and read to the end; the status."""
    sent = urllib.request.Request(
        url + request.path, data=json.dumps(request.body).encode(), headers={"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(sent, timeout=20) as answer:
            answer.read()
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def get(url: str) -> tuple[int, str, str]:
    """Status, content type, body; status 0 while nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.headers["content-type"], answer.read().decode()
    except OSError as error:
        return 0, "", str(error)


async def play(url: str) -> None:
    """The traffic of this test, the last of it cut by the client."""
    assert [await asyncio.to_thread(post, url, request) for request in TRAFFIC] == list(STATUS)
    async with RawClient(int(url.rpartition(":")[2])) as client:
        request = chat("word " * 60, stream=True)
        await client.request("POST", request.path, json.dumps(request.body).encode())
        await client.head()
        await client.read()
    await asyncio.to_thread(
        wait_for, lambda: 'dynamo_frontend_inflight_requests{model="tiny"} 0' in get(f"{url}/metrics")[2], "the end of all"
    )


@asynccontextmanager
async def our_frontend(root: Path) -> AsyncGenerator[str]:
    """A frontend of ours as `stator frontend` composes it; its URL."""
    clock = SystemClock()
    async with (
        Runtime.connect(plane="compatible", discovery="file", file__root=str(root)) as runtime,
        ModelDirectory.follow(runtime, clock=clock) as directory,
    ):
        page = MetricSet()
        page.on_exposition(lambda: runtime.metrics.exposition().decode())
        config = FrontendConfig(port=0)
        app = create_app(directory, config=config, metrics=FrontendMetrics(page, clock), clock=clock)
        async with FrontendServer(app, config=config) as server:
            yield server.url


def listed(url: str) -> Callable[[], bool]:
    return lambda: '"tiny"' in get(f"{url}/v1/models")[2]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Theirs and ours."""
    discovery_root(tmp_path_factory)
    tmp = tmp_path_factory.mktemp("frontends")
    model = build_model_directory(tmp / "model")
    token = load_tokenizer(card_from_directory(model, name="tiny")).encode("hello")[-1]

    async def both(url: str) -> tuple[str, str]:
        await asyncio.to_thread(wait_for, listed(url), "the model at the reference")
        await play(url)
        async with our_frontend(tmp / "kv") as ours:
            await asyncio.to_thread(wait_for, listed(ours), "the model at ours")
            await play(ours)
            found = [await asyncio.to_thread(get, f"{each}/metrics") for each in (url, ours)]
        assert [(status, kind) for status, kind, _ in found] == [(200, "text/plain; charset=utf-8")] * 2
        return found[0][2], found[1][2]

    with reference_frontend(tmp) as url, running(tmp, "-c", WORKER, str(model), str(token)):
        wait_for(lambda: get(f"{url}/live")[0] == 200, "the reference")
        yield asyncio.run(both(url))


class Shown(NamedTuple):
    """One family of a page; `series` without the bounds of buckets."""

    type: str
    help: str
    labels: frozenset[tuple[str, ...]]
    series: dict[tuple[tuple[str, str], ...], float]
    bounds: tuple[str, ...]


def families(page: str) -> dict[str, Shown]:
    found: dict[str, Shown] = {}
    for family in text_string_to_metric_families(page):
        series: dict[tuple[tuple[str, str], ...], float] = {}
        for sample in family.samples:
            if not sample.name.endswith(TIMED):
                labels = {name: "…" if name == "worker_id" else value for name, value in sample.labels.items()}
                series[tuple(sorted(labels.items()))] = sample.value
        bounds = dict.fromkeys(sample.labels["le"] for sample in family.samples if sample.name.endswith("_bucket"))
        labels = frozenset(tuple(sorted(sample.labels)) for sample in family.samples)
        found[family.name] = Shown(family.type, family.documentation, labels, series, tuple(bounds))
    return found


def test_every_family_of_the_reference_is_ours_or_has_a_reason(pages: tuple[str, str]) -> None:
    theirs, ours = map(families, pages)
    missing = {name for name in theirs.keys() - ours.keys() if not name.startswith(tuple(NOT_OURS))}
    more = {name for name in ours.keys() - theirs.keys() if not name.startswith(tuple(NOT_THEIRS))}
    assert (missing, more) == (set(), set())
    for prefix in NOT_OURS:
        assert any(name.startswith(prefix) for name in theirs), f"{prefix}: no reason needed any more"


def test_types_helps_labels_and_buckets_are_the_same(pages: tuple[str, str]) -> None:
    theirs, ours = map(families, pages)
    for name in theirs.keys() & ours.keys():
        one, other = theirs[name], ours[name]
        assert (other.type, other.labels, other.bounds) == (one.type, one.labels, one.bounds), name
        assert (other.help == one.help) is (name not in OTHER_HELP), name


def test_the_same_requests_give_the_same_counts(pages: tuple[str, str]) -> None:
    theirs, ours = map(families, pages)
    different = {
        name: (theirs[name].series, ours[name].series)
        for name in theirs.keys() & ours.keys()
        if theirs[name].series != ours[name].series
    }
    assert {name: both for name, both in different.items() if name not in OTHER_COUNTS} == {}
