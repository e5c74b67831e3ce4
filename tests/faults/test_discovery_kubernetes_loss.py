"""Requests go on while the API server of Kubernetes is away, hangs, forgets, refuses, or somebody deletes everybody's objects."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from stator.discovery import Watch
from stator.protocol.records import EndpointRecord, Query
from stator.runtime import Client, Context, Runtime
from stator.runtime.plugins import load_plugin
from stator.testing.kubernetes_api import KubernetesApi
from stator.testing.plane_suite import eventually

ENDPOINT = "demo.backend.generate"
RATE = 200
"""requests per second"""

pytestmark = [pytest.mark.timeout(120), pytest.mark.load]


@pytest.fixture(scope="module", autouse=True)
def plug_ins() -> None:
    """Looked up here once: looking for them reads the disk."""
    for group, name in (("stator.discovery", "kubernetes"), ("stator.transports", "tcp"), ("stator.routing", "round_robin")):
        load_plugin(group, name)


class Load:
    """A steady stream of requests, each of which has a hundred items."""

    def __init__(self, client: Client) -> None:
        self.sent = 0
        self.answered = 0
        self.failures: list[BaseException] = []
        self._client = client

    async def run(self) -> None:
        """Until cancelled; what is under way then is waited for."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        async with asyncio.TaskGroup() as group:
            try:
                while True:
                    self.sent += 1
                    group.create_task(self._one())
                    await asyncio.sleep(max(0.0, began + self.sent / RATE - loop.time()))
            except asyncio.CancelledError:
                pass

    async def _one(self) -> None:
        try:
            items = await self._client.generate({"n": 100}).collect()
            assert items == list(range(100))
            self.answered += 1
        except Exception as error:
            self.failures.append(error)


async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
    for number in range(request["n"]):
        yield number


@asynccontextmanager
async def cluster(directory: Path) -> AsyncIterator[tuple[KubernetesApi, list[Runtime], Load]]:
    """Two workers and a client under load."""
    async with KubernetesApi() as api, AsyncExitStack() as stack:
        kubeconfig = directory / "config"
        kubeconfig.write_text(api.kubeconfig())

        async def join(**settings: Any) -> Runtime:
            fields = {"kubeconfig": str(kubeconfig), "podinfo": "", "silence": 1.0, "answer_timeout": 1.0, **settings}
            own = {f"kubernetes__{name}": value for name, value in fields.items()}
            return await stack.enter_async_context(Runtime.connect(discovery="kubernetes", **own))

        workers: list[Runtime] = []
        for number in range(2):
            name = f"worker-{number}"
            workers.append(await join(pod_name=name, pod_uid=api.pods.add(name)))
            await workers[-1].endpoint(ENDPOINT).start(generate)
        client = await (await join()).endpoint(ENDPOINT).client()
        await client.wait_for_instances(2, timeout=10)
        load = Load(client)
        running = asyncio.get_running_loop().create_task(load.run())
        try:
            yield api, workers, load
        finally:
            running.cancel()
            await asyncio.wait({running})


OUTAGE = 4.0
"""seconds: four times the silence and the answer that are waited for"""


async def _away(api: KubernetesApi) -> None:
    await api.stop()
    await asyncio.sleep(OUTAGE)
    await api.start()


async def _hangs(api: KubernetesApi) -> None:
    api.hang()
    await asyncio.sleep(OUTAGE)
    api.heal()


async def _forgets(api: KubernetesApi) -> None:
    for _ in range(5):
        api.expire_watches()
        await asyncio.sleep(0.5)  # whether they are there again or not


async def _refuses(api: KubernetesApi) -> None:
    api.fail(429, times=20, retry_after=1)
    api.close_watches()
    await asyncio.sleep(OUTAGE)
    api.heal()


async def _deletes(api: KubernetesApi) -> None:
    """As `kubectl delete dynamoworkermetadatas --all` does."""
    for name in ("worker-0", "worker-1"):
        api.store.delete("dynamoworkermetadatas", "default", name)
    await eventually(lambda: _both_written(api), within=10, what="both have written their objects again")
    await asyncio.sleep(2)  # more than what anybody waits before it believes that they are gone


def _both_written(api: KubernetesApi) -> bool:
    return all(api.metadata(f"worker-{number}") is not None for number in range(2))


@pytest.mark.parametrize("fault", [_away, _hangs, _forgets, _refuses, _deletes], ids=lambda fault: fault.__name__.strip("_"))
async def test_no_request_fails(tmp_path: Path, fault: Callable[[KubernetesApi], Awaitable[None]]) -> None:
    async with cluster(tmp_path) as (api, workers, load):
        watched = workers[0].discovery
        async with watched.watch(Query(EndpointRecord.bucket)) as watch:
            assert len(await anext(watch)) == 2
            changes: list[Any] = []
            reader = asyncio.get_running_loop().create_task(_collect(watch, changes))
            await eventually(lambda: load.answered > RATE, within=20, what="the load is on")
            await fault(api)
            await eventually(lambda: all(worker.discovery.status.connected for worker in workers), within=20)
            await eventually(lambda: _both_written(api), within=10)
            await asyncio.sleep(1)  # in which it would be told of who was missed
            assert changes == [], "nobody was taken for gone"
            reader.cancel()
            await asyncio.wait({reader})
            assert len(await watched.list(Query(EndpointRecord.bucket))) == 2
    assert load.failures == []
    assert load.answered == load.sent > 3 * RATE


async def _collect(watch: Watch, changes: list[Any]) -> None:
    async for batch in watch:
        changes += batch


async def test_a_worker_that_goes_is_not_asked_any_more(tmp_path: Path) -> None:
    """The counterpart: the load above would notice if instances were never taken out."""
    async with cluster(tmp_path) as (api, workers, load):
        await eventually(lambda: load.answered > 0, within=20, what="the load is on")
        api.pods.delete("worker-0")
        async with workers[1].discovery.watch(Query(EndpointRecord.bucket)) as watch, asyncio.timeout(10):
            while len(watch.current) != 1:
                await anext(watch)
        api.pods.delete("worker-1")
        await eventually(lambda: bool(load.failures), within=20, what="requests fail")  # each waits for an instance first
