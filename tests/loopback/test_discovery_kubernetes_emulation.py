"""The emulated API server behaves like the real one where discovery can tell the difference."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from stator.testing.kubernetes_api import KubernetesApi
from stator.testing.kubernetes_pods import LABELS
from stator.testing.kubernetes_store import SLICES as SLICE_KIND

OBJECTS = "/apis/nvidia.com/v1alpha1/namespaces/default/dynamoworkermetadatas"
SLICES = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
PODS = "/api/v1/namespaces/default/pods"
SELECTOR = "nvidia.com/dynamo-discovery-enabled=true"
APPLY = {"Content-Type": "application/apply-patch+yaml"}

pytestmark = pytest.mark.timeout(30)


class Caller:
    """Requests as they are on the wire."""

    def __init__(self, api: KubernetesApi, session: aiohttp.ClientSession) -> None:
        self.api = api
        self._session = session

    async def call(self, method: str, path: str, *, body: Any = None, headers: Any = None, **params: str) -> tuple[int, Any]:
        data = io.BytesIO(json.dumps(body).encode()) if body is not None else None
        async with self._session.request(method, self.api.url + path, params=params, data=data, headers=headers) as response:
            return response.status, await response.json()

    async def apply(self, name: str, data: Any, *, manager: str = "one", force: str = "false") -> tuple[int, Any]:
        body = {
            "apiVersion": "nvidia.com/v1alpha1",
            "kind": "DynamoWorkerMetadata",
            "metadata": {"name": name},
            "spec": {"data": data},
        }
        return await self.call("PATCH", f"{OBJECTS}/{name}", body=body, headers=APPLY, fieldManager=manager, force=force)

    @asynccontextmanager
    async def watch(self, path: str, **params: str) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
        async with self._session.get(self.api.url + path, params={"watch": "true", **params}) as response:
            assert response.status == 200

            async def events() -> AsyncIterator[dict[str, Any]]:
                async for line in response.content:
                    yield json.loads(line)

            yield events()


@pytest.fixture
async def caller() -> AsyncIterator[Caller]:
    async with KubernetesApi(bookmarks=0.2) as api, aiohttp.ClientSession() as session:
        yield Caller(api, session)


async def test_pages_are_of_one_moment(caller: Caller) -> None:
    for number in range(5):
        caller.api.put_metadata(f"w-{number}", {})
    status, first = await caller.call("GET", OBJECTS, limit="2")
    assert status == 200
    assert first["metadata"]["remainingItemCount"] == 3
    caller.api.put_metadata("w-9", {})
    caller.api.store.delete("dynamoworkermetadatas", "default", "w-4")
    names, page = [], first
    while True:
        names += [item["metadata"]["name"] for item in page["items"]]
        if "continue" not in page["metadata"]:
            break
        _, page = await caller.call("GET", OBJECTS, limit="2", **{"continue": page["metadata"]["continue"]})
        assert page["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
    assert names == [f"w-{number}" for number in range(5)]
    status, gone = await caller.call("GET", OBJECTS, limit="2", **{"continue": first["metadata"]["continue"]})
    assert (status, gone["reason"], gone["code"]) == (410, "Expired", 410)


async def test_a_watch_tells_what_happened_since(caller: Caller) -> None:
    _, listed = await caller.call("GET", OBJECTS)
    caller.api.put_metadata("a", {})
    caller.api.put_metadata("a", {"endpoints": {"x": {}}})
    caller.api.put_metadata("a", {"endpoints": {"x": {}}})  # says nothing new
    caller.api.store.delete("dynamoworkermetadatas", "default", "a")
    async with caller.watch(OBJECTS, resourceVersion=listed["metadata"]["resourceVersion"]) as events, asyncio.timeout(5):
        found = [await anext(events) for _ in range(3)]
        assert [event["type"] for event in found] == ["ADDED", "MODIFIED", "DELETED"]
        versions = [int(event["object"]["metadata"]["resourceVersion"]) for event in found]
        assert versions == sorted(set(versions))
        caller.api.put_metadata("b", {})
        assert (await anext(events))["object"]["metadata"]["name"] == "b"


async def test_a_watch_has_a_time_limit_and_bookmarks(caller: Caller) -> None:
    version = str(caller.api.store.revision)
    caller.api.pods.add("w")  # of another kind: only a bookmark tells of its version
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with caller.watch(OBJECTS, resourceVersion=version, timeoutSeconds="1", allowWatchBookmarks="true") as events:
        found = [event async for event in events]
    assert 0.8 < loop.time() - began < 3
    assert {event["type"] for event in found} == {"BOOKMARK"}
    assert int(found[-1]["object"]["metadata"]["resourceVersion"]) == caller.api.store.revision > int(version)
    async with caller.watch(OBJECTS, resourceVersion=version, timeoutSeconds="1") as events:
        assert [event async for event in events] == [], "bookmarks are for those who ask"


async def test_a_version_that_is_too_old_or_too_new(caller: Caller) -> None:
    old = str(caller.api.store.revision)
    caller.api.pods.add("w")
    caller.api.store.compact()
    async with caller.watch(OBJECTS, resourceVersion=old) as events, asyncio.timeout(5):
        event = await anext(events)
        assert (event["type"], event["object"]["code"]) == ("ERROR", 410)
        with pytest.raises(StopAsyncIteration):
            await anext(events)
    status, refusal = await caller.call("GET", OBJECTS, watch="true", resourceVersion="99999")
    assert (status, refusal["details"]) == (504, {"retryAfterSeconds": 1})


async def test_an_object_that_loses_its_label_is_gone_for_those_who_select(caller: Caller) -> None:
    store = caller.api.store
    store.put(SLICE_KIND, "default", {"metadata": {"name": "s"}, "endpoints": []})
    version = str(store.revision)
    assert (await caller.call("GET", SLICES, labelSelector=SELECTOR))[1]["items"] == []
    async with caller.watch(SLICES, resourceVersion=version, labelSelector=SELECTOR) as events, asyncio.timeout(5):
        store.put(SLICE_KIND, "default", {"metadata": {"name": "s", "labels": dict(LABELS)}, "endpoints": []})
        assert (await anext(events))["type"] == "ADDED"
        store.put(SLICE_KIND, "default", {"metadata": {"name": "s"}, "endpoints": []})
        assert (await anext(events))["type"] == "DELETED"


async def test_apply_creates_merges_and_refuses(caller: Caller) -> None:
    status, created = await caller.apply("w", {"endpoints": {"a": {"x": 1}}, "model_cards": {}})
    assert status == 201
    status, same = await caller.apply("w", {"endpoints": {"a": {"x": 1}}, "model_cards": {}})
    assert status == 200
    assert same["metadata"]["resourceVersion"] == created["metadata"]["resourceVersion"], "nothing changed"
    status, changed = await caller.apply("w", {"endpoints": {}, "model_cards": {}})
    assert changed["spec"]["data"] == {"endpoints": {}, "model_cards": {}}
    assert changed["metadata"]["uid"] == created["metadata"]["uid"]
    status, conflict = await caller.apply("w", {"endpoints": 5}, manager="two")
    assert (status, conflict["reason"]) == (409, "Conflict")
    status, taken = await caller.apply("w", {"endpoints": 5}, manager="two", force="true")
    assert (status, taken["spec"]["data"]["endpoints"]) == (200, 5)
    assert {entry["manager"] for entry in taken["metadata"]["managedFields"]} == {"one", "two"}


async def test_apply_wants_its_content_type_a_manager_and_the_right_name(caller: Caller) -> None:
    body = {"apiVersion": "nvidia.com/v1alpha1", "kind": "DynamoWorkerMetadata", "metadata": {"name": "w"}}
    path = f"{OBJECTS}/w"
    assert (await caller.call("PATCH", path, body=body, fieldManager="m"))[0] == 415
    assert (await caller.call("PATCH", path, body=body, headers=APPLY))[0] == 400
    for wrong in ({**body, "kind": "Pod"}, {**body, "metadata": {"name": "other"}}, [1]):
        assert (await caller.call("PATCH", path, body=wrong, headers=APPLY, fieldManager="m"))[0] == 400
    big = {**body, "spec": {"data": "x" * (3 * 2**20)}}
    assert (await caller.call("PATCH", path, body=big, headers=APPLY, fieldManager="m"))[0] == 413
    assert caller.api.metadata("w") is None


async def test_deletion_keeps_to_its_preconditions(caller: Caller) -> None:
    caller.api.put_metadata("w", {})
    found = caller.api.metadata("w")
    assert found is not None
    path = f"{OBJECTS}/w"
    assert (await caller.call("DELETE", path, body={"preconditions": {"uid": "another"}}))[0] == 409
    assert (await caller.call("DELETE", path, body={"preconditions": {"uid": found["metadata"]["uid"]}}))[0] == 200
    assert (await caller.call("DELETE", path))[0] == 404


async def test_pods_have_slices_of_a_hundred(caller: Caller) -> None:
    for number in range(150):
        caller.api.pods.add(f"w-{number}", ready=number != 7)
    _, slices = await caller.call("GET", SLICES, labelSelector=SELECTOR)
    assert [len(each["endpoints"]) for each in slices["items"]] == [100, 50]
    ready = [end["targetRef"]["name"] for each in slices["items"] for end in each["endpoints"] if end["conditions"]["ready"]]
    assert len(ready) == 149
    assert "w-7" not in ready
    _, pods = await caller.call("GET", PODS, labelSelector=SELECTOR, limit="1")
    assert pods["items"][0]["status"]["containerStatuses"] == [{"name": "main", "ready": True, "restartCount": 0}]


async def test_unknown_places_are_not_found(caller: Caller) -> None:
    for path in ("/", "/api/v1/namespaces/default/secrets", "/apis/x/v1/namespaces/default/pods", f"{OBJECTS}/w"):
        assert (await caller.call("GET", path))[0] == 404
    assert (await caller.call("POST", OBJECTS, body={}))[0] == 405
