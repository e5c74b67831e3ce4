"""The Kubernetes backend is a discovery, in both modes; and what is particular to it."""

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from pathlib import Path
from random import Random
from typing import Any, Literal

import aiohttp
import msgspec
import pytest

from stator.config import Secret
from stator.discovery.interface import Discovery
from stator.discovery.kubernetes import KubernetesConfig, KubernetesDiscovery, open_kubernetes
from stator.discovery.kubernetes_access import Ticket
from stator.discovery.kubernetes_identity import instance_id_of
from stator.discovery.kubernetes_kubeconfig import Access, Material
from stator.errors import ConfigError, Unavailable, UsageError
from stator.health import HealthConfig, SystemHealth
from stator.health.server import StatusServer
from stator.protocol.records import EndpointRecord, EventChannelRecord, ModelRecord, Query, RecordKey, encode_record
from stator.runtime.discovery_choice import choose_discovery
from stator.tasks import SystemClock
from stator.testing.discovery_suite import (
    Connect,
    StoredDiscoverySuite,
    channel_record,
    endpoint_record,
    model_record,
    silence,
    until,
)
from stator.testing.kubernetes_api import KubernetesApi
from stator.testing.kubernetes_store import METADATA
from stator.testing.plane_suite import eventually

ENDPOINTS = Query(EndpointRecord.bucket)
MAPS = {"v1/instances": "endpoints", "v1/mdc": "model_cards", "v1/event_channels": "event_channels"}


class KubernetesSuite(StoredDiscoverySuite):
    mode: Literal["pod", "container"]
    debounce: float

    @pytest.fixture(autouse=True)
    def private_directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    @asynccontextmanager
    async def cluster(self) -> AsyncIterator[Connect]:
        async with KubernetesApi(token="letmein") as api:
            self.api = api
            self.planted: dict[str, dict[str, Any]] = {}
            self.kubeconfig = self.directory / f"config-{api.port}"
            self.kubeconfig.write_text(api.kubeconfig())
            api.pods.add("foreign", ready=True)
            numbers = count()
            yield lambda: self.join(f"worker-{next(numbers)}")

    def join(self, name: str) -> AbstractAsyncContextManager[Discovery]:
        uid = self.api.pods.add(name, "main", "side")
        config = KubernetesConfig(
            mode=self.mode,
            pod_name=name,
            pod_uid=uid,
            container="side",
            kubeconfig=str(self.kubeconfig),
            podinfo="",
            debounce=self.debounce,
        )
        return open_kubernetes(config, clock=SystemClock(), random=Random())

    async def plant(self, key: RecordKey, data: bytes) -> None:
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = data.decode("latin-1")[:1000]
        self.planted.setdefault(MAPS[key.bucket], {})[key.path] = value
        self.api.put_metadata("foreign", self.planted)


class TestKubernetesDiscoveryByPod(KubernetesSuite):
    mode = "pod"
    debounce = 0.1


class TestKubernetesDiscoveryByContainer(KubernetesSuite):
    mode = "container"
    debounce = 0.05


# -- what is particular


class Cluster:
    """An emulated API server and the processes in it."""

    def __init__(self, api: KubernetesApi, directory: Path) -> None:
        self.api = api
        self.directory = directory

    def config(self, name: str, **settings: Any) -> KubernetesConfig:
        """Of the process in pod `name`, which is started."""
        kubeconfig = self.directory / "config"
        kubeconfig.write_text(self.api.kubeconfig())
        uid = self.api.pods.add(name) if name else ""
        fields = {"pod_name": name, "pod_uid": uid, "kubeconfig": str(kubeconfig), "podinfo": "", "debounce": 0.02}
        return KubernetesConfig(**{**fields, **settings})

    def join(self, name: str = "", **settings: Any) -> KubernetesDiscovery:
        return open_kubernetes(self.config(name, **settings), clock=SystemClock(), random=Random())


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with KubernetesApi(token="letmein") as api:
        yield Cluster(api, tmp_path)


async def test_the_object_is_the_references(cluster: Cluster) -> None:
    async with cluster.join("worker-0") as worker:
        id = worker.instance_id
        assert id == 0x43710F49C0CFF
        records = [endpoint_record(id), model_record(id, "m"), channel_record(5, "kv_metrics")]
        for record in records:
            await worker.register(record)
        found = cluster.api.metadata("worker-0")
        assert found is not None
        assert found["apiVersion"] == "nvidia.com/v1alpha1"
        assert found["kind"] == "DynamoWorkerMetadata"
        (owner,) = found["metadata"]["ownerReferences"]
        uid = cluster.api.pods.uid("worker-0")
        assert owner == {
            "apiVersion": "v1",
            "blockOwnerDeletion": False,
            "controller": True,
            "kind": "Pod",
            "name": "worker-0",
            "uid": uid,
        }
        expected = {
            "endpoints": {"demo/backend/generate/43710f49c0cff": json.loads(encode_record(records[0]))},
            "model_cards": {"demo/backend/generate/43710f49c0cff": json.loads(encode_record(records[1]))},
            "event_channels": {"demo//kv_metrics/5": json.loads(encode_record(records[2]))},
        }
        assert found["spec"]["data"] == expected
        assert json.loads(msgspec.json.encode(worker.metadata())) == expected
        for record in records:
            await worker.unregister(record.key)
        found = cluster.api.metadata("worker-0")
        assert found is not None
        assert found["spec"]["data"] == {"endpoints": {}, "model_cards": {}, "event_channels": {}}
    assert cluster.api.metadata("worker-0") is None
    applies = [call for call in cluster.api.calls if call.verb == "patch"]
    assert all(call.query == {"force": "true", "fieldManager": "dynamo-worker"} for call in applies)


async def test_requests_are_those_of_the_reference(cluster: Cluster) -> None:
    for number in range(7):
        cluster.api.put_metadata(f"other-{number}", {})
    async with cluster.join("worker-0", page=3):
        await eventually(lambda: cluster.api.watches.open == 2)
    lists = [call for call in cluster.api.calls if (call.verb, call.plural) == ("list", "dynamoworkermetadatas")]
    assert [call.query["limit"] for call in lists] == ["3", "3", "3"]
    assert ["continue" in call.query for call in lists] == [False, True, True]
    (watch,) = (call for call in cluster.api.calls if (call.verb, call.plural) == ("watch", "endpointslices"))
    assert watch.query["allowWatchBookmarks"] == "true"
    assert watch.query["timeoutSeconds"] == "290"
    assert watch.query["labelSelector"] == "nvidia.com/dynamo-discovery-enabled=true"
    assert int(watch.query["resourceVersion"]) > 1000


async def test_container_mode_names_objects_by_container_and_clears_the_old_one(cluster: Cluster) -> None:
    old = endpoint_record(instance_id_of("worker-0-side"))
    cluster.api.put_metadata("worker-0-side", {"endpoints": {old.key.path: json.loads(encode_record(old))}})
    config = cluster.config("worker-0", mode="container", container="side")
    cluster.api.pods.delete("worker-0")
    uid = cluster.api.pods.add("worker-0", "main", "side")
    async with open_kubernetes(config, clock=SystemClock(), random=Random()) as worker:
        assert worker.instance_id == 0xCE262DEDE36D1
        assert cluster.api.metadata("worker-0-side") is None, "the object of the previous container is deleted at start"
        assert await worker.list(ENDPOINTS) == []
        record = endpoint_record(worker.instance_id)
        await worker.register(record)
        found = cluster.api.metadata("worker-0-side")
        assert found is not None
        assert found["metadata"]["ownerReferences"][0]["controller"] is False
        assert await worker.list(ENDPOINTS) == [record]
        cluster.api.pods.set_ready("worker-0", False, container="main")
        assert await worker.list(ENDPOINTS) == [record]
        cluster.api.pods.set_ready("worker-0", False, container="side")
        assert await worker.list(ENDPOINTS) == []
    assert uid


async def test_only_ready_pods_are_seen(cluster: Cluster) -> None:
    async with cluster.join() as client, client.watch(ENDPOINTS) as watch, cluster.join("worker-0") as worker:
        record = endpoint_record(worker.instance_id)
        cluster.api.pods.set_ready("worker-0", False)
        await worker.register(record)
        assert await client.list(ENDPOINTS) == []
        assert await anext(watch) == []
        await silence(watch)
        cluster.api.pods.set_ready("worker-0", True)
        await until(watch, lambda: set(watch.current) == {record.key})
        cluster.api.pods.set_ready("worker-0", False)
        await until(watch, lambda: not watch.current)


async def test_a_deleted_pod_takes_its_object_along(cluster: Cluster) -> None:
    async with cluster.join() as client, client.watch(ENDPOINTS) as watch:
        record = endpoint_record(7)
        uid = cluster.api.pods.add("worker-9")
        cluster.api.put_metadata("worker-9", {"endpoints": {record.key.path: json.loads(encode_record(record))}}, uid=uid)
        await until(watch, lambda: set(watch.current) == {record.key})
        cluster.api.pods.delete("worker-9")
        await until(watch, lambda: not watch.current)
        assert cluster.api.metadata("worker-9") is None


async def test_changes_are_collected_for_half_a_second(cluster: Cluster) -> None:
    loop = asyncio.get_running_loop()
    async with cluster.join(debounce=0.5) as client, client.watch(ENDPOINTS) as watch:
        assert await anext(watch) == []
        began = loop.time()
        for number in range(20):
            record = endpoint_record(number)
            uid = cluster.api.pods.add(f"pod-{number}")
            cluster.api.put_metadata(
                f"pod-{number}", {"endpoints": {record.key.path: json.loads(encode_record(record))}}, uid=uid
            )
            await asyncio.sleep(0)
        async with asyncio.timeout(5):
            batch = await anext(watch)
        assert len(batch) == 20, "one batch"
        assert 0.4 < loop.time() - began < 1.5


async def test_content_that_stops_making_sense_stays(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    record, other = endpoint_record(7), endpoint_record(8)
    good = json.loads(encode_record(record))
    cluster.api.pods.add("worker-9")
    async with cluster.join() as client, client.watch(ENDPOINTS) as watch:
        cluster.api.put_metadata("worker-9", {"endpoints": {record.key.path: good}})
        await until(watch, lambda: set(watch.current) == {record.key})
        for nonsense in ({"endpoints": {record.key.path: {"type": "Endpoint"}}}, {"endpoints": [1, 2]}):
            cluster.api.put_metadata("worker-9", nonsense)
            assert await client.list(ENDPOINTS) == [record]
        store = cluster.api.store
        found = store.objects["dynamoworkermetadatas", "default", "worker-9"]
        store.put(METADATA, "default", {"metadata": {"name": "worker-9"}, "spec": {"data": None}})
        assert found["spec"]["data"] is not None
        assert await client.list(ENDPOINTS) == [record]
        cluster.api.put_metadata(
            "worker-9", {"endpoints": {record.key.path: 5, other.key.path: json.loads(encode_record(other))}}
        )
        assert await client.list(ENDPOINTS) == [record, other]
        cluster.api.put_metadata("worker-9", {"endpoints": {record.key.path: good}})
        await until(watch, lambda: set(watch.current) == {record.key})
    assert sum("ignored" in line.message for line in caplog.records) >= 2


async def test_large_ids_survive_the_server(cluster: Cluster) -> None:
    channel = channel_record(2**64 - 1, "kv_metrics")
    async with cluster.join("worker-0") as worker, cluster.join() as client:
        await worker.register(channel)
        found = cluster.api.metadata("worker-0")
        assert found is not None
        stored = found["spec"]["data"]["event_channels"][channel.key.path]["instance_id"]
        assert isinstance(stored, float), "an API server keeps no such integers"
        assert await client.list(Query(EventChannelRecord.bucket)) == [channel]


async def test_who_is_no_pod_can_look_on_but_not_register(cluster: Cluster) -> None:
    async with cluster.join("worker-0") as worker, cluster.join() as client, cluster.join() as other:
        record = endpoint_record(worker.instance_id)
        await worker.register(record)
        assert await client.list(ENDPOINTS) == [record]
        with pytest.raises(ConfigError, match="POD_NAME not available from file or environment"):
            await client.register(endpoint_record(client.instance_id))
        assert client.instance_id != other.instance_id
    async with cluster.join("", pod_name="worker-7") as nameless:
        with pytest.raises(ConfigError, match="POD_UID not available"):
            await nameless.register(endpoint_record(nameless.instance_id))


async def test_many_registrations_travel_together(cluster: Cluster) -> None:
    async with cluster.join("worker-0") as worker:
        await asyncio.gather(
            *(worker.register(endpoint_record(worker.instance_id, f"demo.backend.e{number}")) for number in range(200))
        )
        found = cluster.api.metadata("worker-0")
        assert found is not None
        assert len(found["spec"]["data"]["endpoints"]) == 200
        assert cluster.api.counted()["patch", "dynamoworkermetadatas"] < 10


async def test_large_objects_are_written_and_too_large_ones_refused_with_the_reason(cluster: Cluster) -> None:
    async with cluster.join("worker-0") as worker, cluster.join() as client:
        record = model_record(worker.instance_id, "m")
        large = msgspec.structs.replace(record, card_json={**record.card_json, "user_data": "x" * 1_300_000})
        assert await worker.register(large)
        assert await client.list(Query(ModelRecord.bucket)) == [large]
        await worker.unregister(large.key)
        too_large = msgspec.structs.replace(record, card_json={**record.card_json, "user_data": "x" * 3_200_000})
        with pytest.raises(Unavailable, match="413 Request entity too large"):
            await worker.register(too_large)
        assert await worker.register(record), "the next one is not harmed"


async def test_registering_costs_no_list(cluster: Cluster) -> None:
    """A thousand workers that start together would otherwise ask for a thousand lists of a thousand objects."""
    async with cluster.join("worker-0") as worker, cluster.join("worker-1") as other:
        before = cluster.api.counted()["list", "dynamoworkermetadatas"]
        for discovery in (worker, other):
            await discovery.register(endpoint_record(discovery.instance_id))
            await discovery.register(model_record(discovery.instance_id, "m"))
            await discovery.register(channel_record(7 + discovery.instance_id, "kv_metrics"))
        with pytest.raises(UsageError, match="a different model 'm'"):
            await other.register(model_record(other.instance_id, "m2", lora=""))
        assert cluster.api.counted()["list", "dynamoworkermetadatas"] == before


async def test_the_status_server_shows_the_maps(cluster: Cluster) -> None:
    async with cluster.join("worker-0") as worker:
        await worker.register(endpoint_record(worker.instance_id))
        health = SystemHealth(clock=SystemClock())
        async with (
            StatusServer(HealthConfig(port=0), health, metrics=bytes, metadata=worker.metadata) as server,
            aiohttp.ClientSession() as session,
            session.get(f"{server.url}/metadata") as response,
        ):
            assert response.status == 200
            found = cluster.api.metadata("worker-0")
            assert found is not None
            assert await response.json() == found["spec"]["data"]


async def test_a_setting_may_name_the_namespace(cluster: Cluster) -> None:
    factory, config = await asyncio.to_thread(
        choose_discovery, "kubernetes://team", {"kubernetes.podinfo": "", "kubernetes.kubeconfig": "/nowhere"}
    )
    assert factory is open_kubernetes
    assert isinstance(config, KubernetesConfig)
    assert config.namespace == "team"


async def test_a_successors_object_is_left_alone(cluster: Cluster) -> None:
    worker = cluster.join("worker-0")
    async with worker:
        await worker.register(endpoint_record(worker.instance_id))
        cluster.api.store.delete("dynamoworkermetadatas", "default", "worker-0")
        cluster.api.put_metadata("worker-0", {"endpoints": {}})
        # closed before anybody noticed
    assert cluster.api.metadata("worker-0") is not None


# -- whom the server lets in


async def test_the_rights_of_the_manifest_suffice_and_less_is_said(cluster: Cluster) -> None:
    api = cluster.api
    api.allowed = {("discovery.k8s.io", "endpointslices", verb) for verb in ("list", "watch")}
    with pytest.raises(ConfigError, match=r"cannot list resource .*dynamoworkermetadatas.* deploy/kubernetes/rbac.yaml"):
        await cluster.join("worker-0").__aenter__()
    api.allowed |= {("nvidia.com", "dynamoworkermetadatas", verb) for verb in ("list", "watch")}
    async with cluster.join("worker-1") as worker:
        with pytest.raises(Unavailable, match="cannot patch resource"):
            await worker.register(endpoint_record(worker.instance_id))
        assert worker.status.connected
        assert dict(worker.owned()) == {}


async def test_a_wrong_token_is_refused_and_shown_nowhere(cluster: Cluster, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    config = cluster.config("worker-0")
    Path(config.kubeconfig).write_text(cluster.api.kubeconfig(token="not-the-token"))
    with pytest.raises(Unavailable, match="401") as caught:
        await open_kubernetes(
            KubernetesConfig(kubeconfig=config.kubeconfig, podinfo="", answer_timeout=0.5), clock=SystemClock(), random=Random()
        ).__aenter__()
    assert "not-the-token" not in repr(caught.value) + caplog.text


async def test_the_token_is_read_again_when_it_changes(cluster: Cluster, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("letmein\n")
    config = cluster.config("worker-0")
    Path(config.kubeconfig).write_text(cluster.api.kubeconfig(tokenFile="token"))
    async with open_kubernetes(config, clock=SystemClock(), random=Random()) as worker:
        await worker.register(endpoint_record(worker.instance_id))
        cluster.api.token = "another"
        token.write_text("another")
        os.utime(token, (1, 1))
        cluster.api.close_watches()
        assert await worker.list(ENDPOINTS) == [endpoint_record(worker.instance_id)]
        assert worker.status.connected
        await worker.unregister(endpoint_record(worker.instance_id).key)


async def test_a_token_whose_file_looks_the_same_is_read_again_when_it_is_refused(cluster: Cluster, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("letmein")
    config = cluster.config("worker-0")
    Path(config.kubeconfig).write_text(cluster.api.kubeconfig(tokenFile="token"))
    async with open_kubernetes(config, clock=SystemClock(), random=Random()) as worker:
        before = token.stat()
        token.write_text("another")
        os.utime(token, ns=(before.st_atime_ns, before.st_mtime_ns))
        cluster.api.token = "another"
        cluster.api.calls.clear()
        assert await worker.register(endpoint_record(worker.instance_id))
        tries = cluster.api.counted()["patch", "dynamoworkermetadatas"]
        assert tries in (1, 2), "once with each token, unless a watch was refused before"


async def test_no_server_is_unavailable_within_the_time(cluster: Cluster) -> None:
    config = cluster.config("worker-0", answer_timeout=0.3)
    await cluster.api.stop()
    with pytest.raises(Unavailable, match=r"cannot open discovery at http://127\.0\.0\.1"):
        async with asyncio.timeout(5):
            await open_kubernetes(config, clock=SystemClock(), random=Random()).__aenter__()


async def test_a_missing_custom_resource_is_said(cluster: Cluster) -> None:
    cluster.api.fail(404, times=2, verbs=("list",))
    with pytest.raises(ConfigError, match=r"kubectl apply -f deploy/kubernetes/crd.yaml"):
        await cluster.join("worker-0").__aenter__()


async def test_models_of_unready_pods_forbid_nothing(cluster: Cluster) -> None:
    async with cluster.join("old") as old, cluster.join("new") as new:
        await old.register(model_record(old.instance_id, "m1"))
        cluster.api.pods.set_ready("old", False)
        await new.list(Query(ModelRecord.bucket))
        assert await new.register(model_record(new.instance_id, "m2"))


async def test_a_key_of_an_unknown_process_is_refused(cluster: Cluster) -> None:
    record = endpoint_record(7)
    cluster.api.pods.add("foreign")
    async with cluster.join("worker-0") as worker:
        cluster.api.put_metadata("foreign", {"endpoints": {record.key.path: json.loads(encode_record(record))}})
        with pytest.raises(UsageError, match="registered by another owner"):
            await worker.register(record)


def test_nothing_shows_a_token() -> None:
    access = Access(server="https://x", token=Material(text=Secret("geheim")), key=Material(text=Secret("geheim")))
    ticket = Ticket(token=Secret("geheim"), context=None)
    assert "geheim" not in repr(access) + repr(ticket) + str(access)
