"""One emulated API server, processes of the reference 1.3.1 and ours: each sees the other's records and calls it over TCP."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any, Literal

import pytest

from interop.peers import Peer, needs_reference
from stator.discovery.kubernetes import KubernetesConfig, KubernetesDiscovery, open_kubernetes
from stator.discovery.kubernetes_identity import instance_id_of, object_name
from stator.errors import Unavailable
from stator.protocol.records import EndpointRecord, ModelRecord, Query
from stator.runtime import Context, Runtime
from stator.runtime.plugins import load_plugin
from stator.tasks import SystemClock
from stator.testing.discovery_suite import channel_record, endpoint_record, model_record, until
from stator.testing.kubernetes_api import KubernetesApi
from stator.testing.plane_suite import eventually

ENDPOINT = "demo.backend.generate"
QUERY = Query(EndpointRecord.bucket, ("demo", "backend", "generate"))
Mode = Literal["pod", "container"]

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]


@pytest.fixture(scope="module", autouse=True)
def plug_ins() -> None:
    """Looked up here once: looking for them reads the disk."""
    for group, name in (("stator.discovery", "kubernetes"), ("stator.transports", "tcp"), ("stator.routing", "round_robin")):
        load_plugin(group, name)


class Cluster:
    """Pods of both kinds."""

    def __init__(self, api: KubernetesApi, directory: Path, stack: AsyncExitStack) -> None:
        self.api = api
        self.directory = directory
        self.kubeconfig = directory / "config"
        self.kubeconfig.write_text(api.kubeconfig())
        self._stack = stack

    async def peer(self, script: str, pod: str, mode: Mode = "pod", **env: str) -> Peer:
        """A process of the reference in a pod of its own, which is ready at once."""
        uid = self.api.pods.add(pod, "side")
        process = Peer(
            script,
            self.directory,
            {
                "DYN_DISCOVERY_BACKEND": "kubernetes",
                "KUBECONFIG": str(self.kubeconfig),
                "POD_NAME": pod,
                "POD_UID": uid,
                "POD_NAMESPACE": "default",
                "DYN_KUBE_DISCOVERY_MODE": mode,
                "CONTAINER_NAME": "side",
                **env,
            },
        )
        self._stack.push_async_callback(asyncio.to_thread, process.close)
        await asyncio.to_thread(process.wait_ready)
        return process

    def settings(self, pod: str, mode: Mode = "pod") -> dict[str, Any]:
        """Of one of our processes, in a pod of its own."""
        uid = self.api.pods.add(pod, "side")
        return {
            "mode": mode,
            "pod_name": pod,
            "pod_uid": uid,
            "container": "side",
            "kubeconfig": str(self.kubeconfig),
            "podinfo": "",
        }

    async def discovery(self, pod: str, mode: Mode = "pod") -> KubernetesDiscovery:
        config = KubernetesConfig(**self.settings(pod, mode))
        return await self._stack.enter_async_context(open_kubernetes(config, clock=SystemClock(), random=Random()))

    async def runtime(self, pod: str, mode: Mode = "pod") -> Runtime:
        fields = {f"kubernetes__{name}": value for name, value in self.settings(pod, mode).items()}
        return await self._stack.enter_async_context(Runtime.connect(discovery="kubernetes", plane="compatible", **fields))

    def records(self, name: str, place: str = "endpoints") -> dict[str, Any]:
        """What a metadata object has."""
        found = self.api.metadata(name)
        return {} if found is None else found["spec"]["data"][place]


@asynccontextmanager
async def opened(directory: Path) -> AsyncIterator[Cluster]:
    async with KubernetesApi() as api, AsyncExitStack() as stack:
        yield Cluster(api, directory, stack)


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with opened(tmp_path) as found:
        yield found


@pytest.mark.parametrize("mode", ["pod", "container"])
async def test_a_worker_of_the_reference_is_seen_and_called(cluster: Cluster, mode: Mode) -> None:
    runtime = await cluster.runtime("ours-0", mode)
    worker = await cluster.peer("peer_worker.py", "ref-0", mode)
    name = object_name("ref-0", "side" if mode == "container" else "")
    client = await runtime.endpoint(ENDPOINT).client()
    try:
        ids = await client.wait_for_instances(timeout=30)
    except Unavailable as error:
        raise AssertionError(f"{error}; {cluster.records(name)} {runtime.discovery.status}\n{worker.log()}") from None
    assert ids == [instance_id_of(name)], "both make the same id from a name"
    assert len(cluster.records(name)) == 1
    items = await client.generate({"mode": "count", "n": 5}).collect()
    assert [item["token_ids"] for item in items] == [[number] for number in range(5)]
    cluster.api.pods.set_ready("ref-0", False)
    async with runtime.discovery.watch(QUERY) as watch:
        await until(watch, lambda: not watch.current)
        cluster.api.pods.set_ready("ref-0", True)
        await until(watch, lambda: [key.id for key in watch.current] == ids)
        await asyncio.to_thread(worker.kill)
        cluster.api.pods.delete("ref-0")
        await until(watch, lambda: not watch.current)
    assert cluster.records(name) == {}


@pytest.mark.parametrize("mode", ["pod", "container"])
async def test_our_worker_is_seen_and_called_by_the_reference(cluster: Cluster, mode: Mode) -> None:
    first, second = await cluster.runtime("ours-0", mode), await cluster.runtime("ours-1", mode)
    for runtime in (first, second):
        await runtime.endpoint(ENDPOINT).start(_naming(runtime.instance_id))
    client = await cluster.peer("peer_client.py", "ref-0", mode)

    async def answering(*runtimes: Runtime) -> None:
        """Wait until these answer and no others, and nothing fails from then on.

        The reference collects changes for half a second, as we do, and fails what is on its way to an instance that goes.
        """
        wanted = {runtime.instance_id for runtime in runtimes}
        async with asyncio.timeout(20):
            while await asked() != wanted:
                pass
        assert await asked() == wanted

    async def asked() -> set[int | str]:
        """Who answered, and what went wrong."""
        answers = await client.ask(endpoint=ENDPOINT, request={"n": 3}, times=8)
        assert all(answer["error"] or len(answer["items"]) == 3 for answer in answers["results"]), answers
        found = {item["who"] for answer in answers["results"] for item in answer["items"]}
        return found | {answer["error"] for answer in answers["results"] if answer["error"]}

    await answering(first, second)
    cluster.api.pods.set_ready("ours-0", False)
    await answering(second)
    cluster.api.pods.set_ready("ours-0", True)
    await answering(first, second)


def _naming(id: int) -> Callable[[Any, Context], AsyncIterator[Any]]:
    async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
        for number in range(request["n"]):
            yield {"who": id, "number": number}

    return generate


async def test_all_three_maps_of_ours_leave_the_reference_content(cluster: Cluster) -> None:
    """An object that the reference cannot parse would hide its worker: it still sees our instance with model and channel beside."""
    ours = await cluster.discovery("ours-0")
    record = endpoint_record(ours.instance_id, tcp="127.0.0.1:9/1/generate")
    await ours.register(model_record(ours.instance_id, "m"))
    await ours.register(channel_record(2**63 - 1, "kv_metrics"))
    await ours.register(record)
    client = await cluster.peer("peer_client.py", "ref-0")
    answer = await client.ask(endpoint=ENDPOINT, request={"n": 1}, within=20)
    assert "refused" in (answer["error"] or ""), "it went to our address, where nobody listens"


async def test_ids_beyond_63_bits_hide_an_object_from_the_reference(cluster: Cluster) -> None:
    """Why publishers of events should not have such ids here: API servers keep them as doubles, which the reference cannot read."""
    ours = await cluster.discovery("ours-0")
    await ours.register(endpoint_record(ours.instance_id, tcp="127.0.0.1:9/1/generate"))
    large = channel_record(2**63 + 1025, "kv_metrics")
    await ours.register(large)
    client = await cluster.peer("peer_client.py", "ref-0", DYN_LOG="warn")
    with pytest.raises(AssertionError, match="no answer"):
        await client.ask(endpoint=ENDPOINT, request={"n": 1}, within=3)
    assert "invalid type: floating point" in client.log()
    await ours.unregister(large.key)
    await eventually(lambda: cluster.records("ours-0", "event_channels") == {})
    answer = await client.ask(endpoint=ENDPOINT, request={"n": 1}, within=20)
    assert "refused" in (answer["error"] or "")


async def test_the_object_of_the_reference_is_as_ours(cluster: Cluster) -> None:
    """Same names, owners and parameters; a second manager would mean that neither could ever remove what the other said."""
    await cluster.peer("peer_worker.py", "same-0")
    await eventually(lambda: len(cluster.records("same-0")) == 1, within=20)
    theirs = cluster.api.metadata("same-0")
    assert theirs is not None
    their_call = next(call for call in cluster.api.calls if call.verb == "patch")
    ours = await cluster.discovery("same-1")
    await ours.register(endpoint_record(ours.instance_id))
    mine = cluster.api.metadata("same-1")
    assert mine is not None
    our_call = next(call for call in cluster.api.calls if call.verb == "patch" and call.name == "same-1")
    assert our_call.query == their_call.query
    assert mine["metadata"]["ownerReferences"][0].keys() == theirs["metadata"]["ownerReferences"][0].keys()
    for metadata in (mine["metadata"], theirs["metadata"]):
        assert [entry["manager"] for entry in metadata["managedFields"]] == ["dynamo-worker"]
    assert mine["spec"]["data"].keys() == theirs["spec"]["data"].keys()
    models = await ours.list(Query(ModelRecord.bucket))
    assert models == []
    seen = await ours.list(QUERY)
    assert {each.instance_id for each in seen} == {instance_id_of("same-0"), instance_id_of("same-1")}
