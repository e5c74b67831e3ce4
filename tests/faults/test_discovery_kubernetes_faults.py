"""The Kubernetes backend while its API server forgets, refuses, stalls, restarts or is gone, and others interfere."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from time import process_time
from typing import Any, cast

import psutil
import pytest

from stator.discovery import kubernetes, kubernetes_guard
from stator.discovery.interface import Added, Removed, Watch
from stator.discovery.kubernetes import KubernetesConfig, KubernetesDiscovery, open_kubernetes
from stator.errors import Unavailable
from stator.protocol.records import EndpointRecord, Query, encode_record
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record, model_record, silence, until
from stator.testing.kubernetes_api import KubernetesApi
from stator.testing.plane_suite import eventually

ENDPOINTS = Query(EndpointRecord.bucket)

pytestmark = pytest.mark.timeout(60)


class Cluster:
    """An emulated API server, processes that use it, and pods of others."""

    def __init__(self, api: KubernetesApi, directory: Path) -> None:
        self.api = api
        self.kubeconfig = directory / "config"
        self.kubeconfig.write_text(api.kubeconfig())

    def join(self, name: str = "", **settings: Any) -> KubernetesDiscovery:
        uid = self.api.pods.add(name) if name else ""
        fields = {
            "pod_name": name,
            "pod_uid": uid,
            "kubeconfig": str(self.kubeconfig),
            "podinfo": "",
            "debounce": 0.02,
            "answer_timeout": 1.0,
        }
        return open_kubernetes(KubernetesConfig(**{**fields, **settings}), clock=SystemClock(), random=Random())

    def watched(self) -> int:
        """How many watches were asked for."""
        return sum(count for (verb, _), count in self.api.counted().items() if verb == "watch")

    def foreign(self, number: int, *, tcp: str = "192.0.2.1:4000/a/generate") -> EndpointRecord:
        """A worker that is none of ours, whose object is written without it."""
        record = endpoint_record(number, tcp=tcp)
        name = f"pod-{number}"
        try:
            uid = self.api.pods.uid(name)
        except KeyError:
            uid = self.api.pods.add(name)
        self.api.put_metadata(name, {"endpoints": {record.key.path: json.loads(encode_record(record))}}, uid=uid)
        return record


@asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[Cluster]:
    async with KubernetesApi(**options) as api:
        yield Cluster(api, directory)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with opened(tmp_path) as found:
        yield found


async def knows(watch: Watch, *records: EndpointRecord, within: float = 10.0) -> None:
    await until(watch, lambda: watch.current == {record.key: record for record in records}, within=within)


# -- the history is gone


@pytest.mark.parametrize("told", [True, False], ids=["told in the stream", "told at resuming"])
async def test_a_lost_history_is_a_difference(cluster: Cluster, told: bool) -> None:
    stays, goes, changes = (cluster.foreign(number) for number in (1, 2, 3))
    async with cluster.join() as client, client.watch(ENDPOINTS) as watch:
        await knows(watch, stays, goes, changes)
        await eventually(lambda: cluster.api.watches.open == 2)
        cluster.api.stall()
        cluster.api.pods.delete("pod-2")
        changed = cluster.foreign(3, tcp="192.0.2.9:1/a/generate")
        comes = cluster.foreign(4)
        if told:
            cluster.api.expire_watches()
        else:
            cluster.api.store.compact()
            cluster.api.close_watches()
        cluster.api.heal()
        async with asyncio.timeout(10):
            batch = await anext(watch)
            while len(watch.current) != 3 or comes.key not in watch.current:
                batch += await anext(watch)
        assert set(map(str, batch)) == set(map(str, [Removed(goes.key), Added(changed), Added(comes)])), (
            "no more than the difference"
        )
        assert watch.current == {record.key: record for record in (stays, changed, comes)}
        assert client.status.connected
        await eventually(lambda: cluster.api.watches.open == 2)


async def test_a_history_lost_again_and_again_is_not_answered_by_hurrying(cluster: Cluster) -> None:
    record = cluster.foreign(1)
    async with cluster.join() as client, client.watch(ENDPOINTS) as watch:
        await knows(watch, record)
        before = len(cluster.api.calls)
        for _ in range(40):
            cluster.api.expire_watches()
            await asyncio.sleep(0.05)  # for two seconds in all, twenty times a second
        assert len(cluster.api.calls) - before < 60
        another = cluster.foreign(2)
        await knows(watch, record, another)


async def test_pages_that_are_forgotten_are_listed_in_one(tmp_path: Path) -> None:
    async with opened(tmp_path) as cluster:
        records = [cluster.foreign(number) for number in range(10)]
        real, seen = cluster.api.store.select, 0

        def forgetting(*arguments: Any) -> Any:
            nonlocal seen
            seen += 1
            asyncio.get_running_loop().call_soon(cluster.api.forget_pages)
            return real(*arguments)

        cluster.api.store.select = forgetting  # pyright: ignore[reportAttributeAccessIssue]  # for this test only
        async with cluster.join(page=4) as client:
            assert await client.list(ENDPOINTS) == records
        assert seen >= 4
        assert any("limit" not in call.query for call in cluster.api.calls if call.verb == "list")


# -- it refuses


@pytest.mark.parametrize("code", [429, 500, 503])
async def test_storms_of_refusals_are_sat_out(cluster: Cluster, code: int) -> None:
    record = cluster.foreign(1)
    async with cluster.join("worker-0") as worker, worker.watch(ENDPOINTS) as watch:
        await knows(watch, record)
        cluster.api.fail(code, times=8)
        before = len(cluster.api.calls)
        cluster.api.close_watches()
        await eventually(lambda: not worker.status.connected, what="stale")
        assert f"{code}" in worker.status.reason
        assert watch.current == {record.key: record}
        another = cluster.foreign(2)
        await knows(watch, record, another, within=20)
        assert worker.status.connected
        assert len(cluster.api.calls) - before < 20


async def test_retry_after_is_honoured(cluster: Cluster) -> None:
    loop = asyncio.get_running_loop()
    async with cluster.join("worker-0") as worker, worker.watch(ENDPOINTS) as watch:
        assert await anext(watch) == []
        await eventually(lambda: cluster.api.watches.open == 2)
        watches = cluster.watched()
        cluster.api.fail(429, times=2, retry_after=2, verbs=("watch",))
        cluster.api.close_watches()
        began = loop.time()
        await eventually(lambda: cluster.watched() == watches + 2, what="both watches are refused")
        await eventually(lambda: not worker.status.connected)
        before = len(cluster.api.calls)
        await asyncio.sleep(1.5)  # most of the time that was asked for
        assert len(cluster.api.calls) == before, "it was left alone"
        await eventually(lambda: cluster.api.watches.open == 2, within=10)
        assert 2.0 <= loop.time() - began < 6.0
        assert worker.status.connected


async def test_a_registration_outlives_refusals_and_fails_with_the_reason(cluster: Cluster) -> None:
    async with cluster.join("worker-0") as worker:
        cluster.api.fail(503, times=2, verbs=("patch",))
        assert await worker.register(endpoint_record(worker.instance_id))
        cluster.api.fail(503, times=100, verbs=("patch",))
        with pytest.raises(Unavailable, match=r"cannot register .*503"):
            await worker.register(endpoint_record(worker.instance_id, "demo.backend.other"))
        assert len(worker.owned()) == 1
        key = endpoint_record(worker.instance_id).key
        assert await worker.unregister(key) is True, "never fails"
        cluster.api.heal()
        await eventually(lambda: _endpoints(cluster, "worker-0") == set(), within=20)
        assert worker.status.connected


def _endpoints(cluster: Cluster, name: str) -> set[str] | None:
    found = cluster.api.metadata(name)
    return None if found is None else set(found["spec"]["data"]["endpoints"])


# -- it stalls


async def test_a_silent_watch_is_resumed(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    record = cluster.foreign(1)
    async with cluster.join(silence=0.5) as client, client.watch(ENDPOINTS) as watch:
        await knows(watch, record)
        cluster.api.stall()
        await eventually(lambda: cluster.api.watches.open == 2)
        another = cluster.foreign(2)
        watches = cluster.api.counted()["watch", "dynamoworkermetadatas"]
        await eventually(lambda: cluster.api.counted()["watch", "dynamoworkermetadatas"] > watches)
        assert client.status.connected, "silence alone is no evidence"
        cluster.api.heal()
        await knows(watch, record, another)
    assert any("says nothing any more" in line.message for line in caplog.records)


async def test_bookmarks_keep_a_watch_and_its_version_alive(tmp_path: Path) -> None:
    async with opened(tmp_path, bookmarks=0.1) as cluster:
        record = cluster.foreign(1)
        async with cluster.join(silence=0.5) as client, client.watch(ENDPOINTS) as watch:
            await knows(watch, record)
            await _bookmarked(cluster, client, "first")  # so the watch that opening this one renewed is there
            before = cluster.api.counted()
            await asyncio.sleep(1.2)  # more than twice the silence that is borne
            assert cluster.api.counted()["watch", "dynamoworkermetadatas"] == before["watch", "dynamoworkermetadatas"]
            await _bookmarked(cluster, client, *(f"idle-{number}" for number in range(5)))
            cluster.api.store.compact()  # the history up to the last bookmark is forgotten
            cluster.api.close_watches()
            another = cluster.foreign(2)
            await knows(watch, record, another)
            after = cluster.api.counted()
            assert after["list", "dynamoworkermetadatas"] == before["list", "dynamoworkermetadatas"], "resumed, not listed"


async def _bookmarked(cluster: Cluster, client: KubernetesDiscovery, *pods: str) -> None:
    """Changes of another kind, of which only a bookmark tells."""
    for name in pods:
        cluster.api.pods.add(name)
    version, metadata = str(cluster.api.store.revision), cast(Any, client)._metadata
    await eventually(lambda: metadata._version == version, what="a bookmark has told of them")


async def test_the_time_limit_of_a_watch_is_no_fault(cluster: Cluster) -> None:
    record = cluster.foreign(1)
    async with cluster.join(watch_timeout=1) as client, client.watch(ENDPOINTS) as watch:
        await knows(watch, record)
        lists = cluster.api.counted()["list", "dynamoworkermetadatas"]
        for number in range(2, 5):
            await asyncio.sleep(0.6)  # three times, so that the limit has passed at least once
            await knows(watch, *(endpoint_record(other) for other in range(1, number)), cluster.foreign(number))
            assert client.status.connected
        counted = cluster.api.counted()
        assert counted["list", "dynamoworkermetadatas"] == lists
        assert 2 <= counted["watch", "dynamoworkermetadatas"] < 10


async def test_a_server_that_hangs_stops_nobody(cluster: Cluster) -> None:
    loop = asyncio.get_running_loop()
    record = cluster.foreign(1)
    async with cluster.join("worker-0", silence=0.5, answer_timeout=0.5) as worker, worker.watch(ENDPOINTS) as watch:
        mine = endpoint_record(worker.instance_id)
        await worker.register(mine)
        await knows(watch, record, mine)
        cluster.api.hang()
        began = loop.time()
        assert await worker.list(ENDPOINTS) == [record, mine]
        assert loop.time() - began < 3
        await eventually(lambda: not worker.status.connected)
        with pytest.raises(Unavailable, match="cannot register"):
            await worker.register(endpoint_record(worker.instance_id, "demo.backend.other"))
        assert watch.current == {record.key: record, mine.key: mine}
        cluster.api.heal()
        another = cluster.foreign(2)
        await knows(watch, record, mine, another, within=20)
        await eventually(lambda: worker.status.connected, within=10)


# -- it goes and comes back


async def test_a_restart_is_no_change(cluster: Cluster) -> None:
    record = cluster.foreign(1)
    async with cluster.join("worker-0") as worker, worker.watch(ENDPOINTS) as watch:
        mine = endpoint_record(worker.instance_id)
        await worker.register(mine)
        await knows(watch, record, mine)
        await cluster.api.stop()
        await eventually(lambda: not worker.status.connected)
        since = worker.status.stale_since
        assert since is not None
        assert await worker.list(ENDPOINTS) == [record, mine]
        assert set((await worker.last_seen(ENDPOINTS)).values()) == {since}
        await silence(watch, 0.5)
        await cluster.api.start()
        await eventually(lambda: worker.status.connected, within=10)
        await silence(watch, 0.5)
        another = cluster.foreign(2)
        await knows(watch, record, mine, another)


async def test_a_server_that_comes_back_empty_gets_our_records_again(cluster: Cluster) -> None:
    record = cluster.foreign(1)
    async with cluster.join("worker-0") as worker, worker.watch(ENDPOINTS) as watch:
        mine = endpoint_record(worker.instance_id)
        await worker.register(mine)
        await knows(watch, record, mine)
        await cluster.api.stop()
        cluster.api.lose_everything()
        cluster.api.pods.add("worker-0")
        await cluster.api.start()
        await eventually(lambda: _endpoints(cluster, "worker-0") == {mine.key.path}, within=20)
        await eventually(lambda: worker.status.connected, within=10)
        assert await worker.list(ENDPOINTS) == [mine]


async def test_what_changed_while_the_server_was_away_is_written_when_it_is_back(cluster: Cluster) -> None:
    loop = asyncio.get_running_loop()
    async with cluster.join("worker-0", answer_timeout=2.0) as worker:
        stays, goes = endpoint_record(worker.instance_id), endpoint_record(worker.instance_id, "demo.backend.goes")
        await worker.register(stays)
        await worker.register(goes)
        await cluster.api.stop()
        await eventually(lambda: not worker.status.connected)
        began = loop.time()
        assert await worker.unregister(goes.key) is True
        assert loop.time() - began < 1.5, "it is known that nobody answers"
        with pytest.raises(Unavailable):
            await worker.register(endpoint_record(worker.instance_id, "demo.backend.late"))
        assert set(worker.owned()) == {stays.key}
        await cluster.api.start()
        await eventually(lambda: _endpoints(cluster, "worker-0") == {stays.key.path}, within=15)


async def test_closing_without_server_ends_soon(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    async with AsyncExitStack() as stack:
        worker = await stack.enter_async_context(cluster.join("worker-0"))
        await worker.register(endpoint_record(worker.instance_id))
        await cluster.api.stop()
        async with asyncio.timeout(5):
            await worker.aclose()
    assert any("stays until the pod is gone" in line.message for line in caplog.records)


async def test_an_apply_under_way_does_not_outlive_its_owner(cluster: Cluster) -> None:
    """The server goes on with what was begun, even if nobody waits: deleted first, the object would come back."""
    async with cluster.join("worker-0") as worker:
        cluster.api.delays["patch"] = 0.3
        registering = asyncio.get_running_loop().create_task(worker.register(endpoint_record(worker.instance_id)))
        await eventually(lambda: cluster.api.counted()["patch", "dynamoworkermetadatas"] == 1)
        await worker.aclose()
        with pytest.raises(Unavailable):
            await registering
    await asyncio.sleep(0.6)  # the apply that nobody waits for is over, twice
    assert cluster.api.metadata("worker-0") is None


async def test_closing_tries_more_than_once(cluster: Cluster) -> None:
    async with cluster.join("worker-0") as worker:
        await worker.register(endpoint_record(worker.instance_id))
        cluster.api.fail(503, times=2, verbs=("delete",))
    assert cluster.api.metadata("worker-0") is None


async def test_who_may_not_delete_leaves_nothing_inside(cluster: Cluster) -> None:
    async with cluster.join("worker-0") as worker:
        await worker.register(endpoint_record(worker.instance_id))
        cluster.api.fail(403, times=1, verbs=("delete",))
    assert _endpoints(cluster, "worker-0") == set()


async def test_a_cancelled_closing_goes_on(cluster: Cluster) -> None:
    worker = await cluster.join("worker-0").__aenter__()
    await worker.register(endpoint_record(worker.instance_id))
    closing = asyncio.get_running_loop().create_task(worker.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await eventually(lambda: cluster.api.metadata("worker-0") is None)
    await worker.aclose()


# -- others interfere


async def test_our_deleted_object_is_written_again(
    cluster: Cluster, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes_guard, "_INTERVAL", 2.0)
    async with cluster.join("worker-0") as worker, cluster.join() as client, client.watch(ENDPOINTS) as watch:
        mine = endpoint_record(worker.instance_id)
        await worker.register(mine)
        await knows(watch, mine)
        cluster.api.store.delete("dynamoworkermetadatas", "default", "worker-0")
        await eventually(lambda: _endpoints(cluster, "worker-0") == {mine.key.path})
        await knows(watch, mine)
        assert "somebody has deleted DynamoWorkerMetadata worker-0" in caplog.text
        applies = cluster.api.counted()["patch", "dynamoworkermetadatas"]
        for _ in range(5):  # somebody insists, a quarter of the interval long: we do not fight
            cluster.api.store.delete("dynamoworkermetadatas", "default", "worker-0")
            await asyncio.sleep(0.1)
        assert cluster.api.counted()["patch", "dynamoworkermetadatas"] <= applies + 1
        await eventually(lambda: _endpoints(cluster, "worker-0") == {mine.key.path}, within=10)


async def test_our_changed_object_is_written_again(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster.join("worker-0") as worker:
        mine = endpoint_record(worker.instance_id)
        await worker.register(mine)
        await worker.list(ENDPOINTS)
        cluster.api.put_metadata("worker-0", {"endpoints": {}})
        await eventually(lambda: _endpoints(cluster, "worker-0") == {mine.key.path})
        assert "use container mode" in caplog.text


async def test_nobody_suspects_our_own_changes(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster.join("worker-0", debounce=0.0) as worker, worker.watch(ENDPOINTS) as watch:
        keys = [endpoint_record(worker.instance_id, f"demo.backend.e{number}") for number in range(10)]
        for _ in range(5):
            for record in keys:
                await worker.register(record)
            for record in keys:
                await worker.unregister(record.key)
        await worker.register(keys[0])
        await worker.register(model_record(worker.instance_id, "m"))
        await knows(watch, keys[0])
        await silence(watch, 0.3)
    assert "somebody has" not in caplog.text


async def test_a_flapping_pod_ends_as_it_is(cluster: Cluster) -> None:
    record = cluster.foreign(1)
    async with cluster.join() as client, client.watch(ENDPOINTS) as watch:
        await knows(watch, record)
        for _ in range(20):
            cluster.api.pods.set_ready("pod-1", False)
            await asyncio.sleep(0.01)
            cluster.api.pods.set_ready("pod-1", True)
            await asyncio.sleep(0.01)
        assert await client.list(ENDPOINTS) == [record]
        cluster.api.pods.set_ready("pod-1", False)
        await until(watch, lambda: not watch.current)


async def test_a_mistake_of_ours_ends_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows or writes no more would live on with old news, and nobody would notice."""
    failures = 0

    def failing(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal failures
            if failures:
                failures -= 1
                raise ValueError("a mistake")
            return real(*arguments)

        return call

    monkeypatch.setattr(kubernetes, "read_metadata", failing(kubernetes.read_metadata))
    monkeypatch.setattr(kubernetes, "metadata_object", failing(kubernetes.metadata_object))
    async with cluster.join("worker-0") as worker, worker.watch(ENDPOINTS) as watch:
        failures = 2
        record = cluster.foreign(1)
        await knows(watch, record)
        assert failures == 0
        failures = 1
        mine = endpoint_record(worker.instance_id)
        assert await worker.register(mine)
        await knows(watch, record, mine)


# -- many


@pytest.mark.load
@pytest.mark.timeout(120)
async def test_a_thousand_instances_join_and_leave(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    """Within 10 s each way, seen by four processes: all agree within a second after the last change, beyond the debounce."""
    loop = asyncio.get_running_loop()
    debounce = 0.5
    memory = psutil.Process().memory_info
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(cluster.join(debounce=debounce)) for _ in range(4)]
        watches = [await stack.enter_async_context(client.watch(ENDPOINTS)) for client in clients]
        await eventually(lambda: cluster.api.watches.open == 8)
        lines: list[str] = []
        sizes: list[float] = []
        for what in ("join", "leave") * 2:
            cpu, began = process_time(), loop.time()
            readers = [loop.create_task(_follow(watch, 1000 if what == "join" else 0)) for watch in watches]
            for number in range(1000):
                if what == "join":
                    cluster.foreign(number)
                else:
                    cluster.api.pods.delete(f"pod-{number}")
                await asyncio.sleep(max(0.0, began + number * 0.005 - loop.time()))
            last = loop.time()
            done = [await asyncio.wait_for(reader, 30) for reader in readers]
            late = max(done) - last - debounce
            cluster.api.store.compact()  # what the emulation remembers is not to be measured
            sizes.append(memory().rss / 2**20)
            lines.append(
                f"{what}: {last - began:.1f} s of changes, all agree {late:+.2f} s after the last one and the debounce, "
                f"{process_time() - cpu:.1f} s CPU (server and four processes), {sizes[-1]:.0f} MiB"
            )
            assert late < 1.0, lines
        assert sizes[-1] - sizes[1] < 25, lines
        assert all(watch.pending == 0 for watch in watches)
    with capsys.disabled():
        print("\n" + "\n".join(lines))


async def _follow(watch: Watch, wanted: int) -> float:
    """When the watch knows that many records."""
    while len(watch.current) != wanted:
        await anext(watch)
    return asyncio.get_running_loop().time()
