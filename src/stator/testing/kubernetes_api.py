"""An emulated Kubernetes API server on a free port of 127.0.0.1, with what discovery needs of the real one, and with faults.

    async with KubernetesApi() as api:
        api.pods.add("worker-0")
        kubeconfig.write_text(api.kubeconfig())
        api.fail(429, times=3, retry_after=1); api.expire_watches(); await api.stop(); await api.start()

It knows lists in pages, watches with versions, bookmarks and time limits, server-side apply with managers, deletion with
preconditions, labels, owners, tokens and what they may do (`allowed`), and keeps count of who asked for what (`calls`).
"""

import asyncio
import base64
import json
import ssl
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import msgspec
from aiohttp import web

from stator.testing.kubernetes_apply import ApplyConflict, apply, fields_of_managers
from stator.testing.kubernetes_pods import Pods
from stator.testing.kubernetes_store import METADATA, RESOURCES, KubernetesStore, Resource
from stator.testing.kubernetes_watch import Call, Refused, Watcher, WatchState

__all__ = ["Call", "KubernetesApi", "Refused"]

Object = dict[str, Any]

_MAX_BODY = 3 * 2**20
"""bytes that a real API server takes in one request"""


class _Fault(msgspec.Struct, kw_only=True):
    code: int
    times: int
    retry_after: int | None
    verbs: Collection[str]


class KubernetesApi:
    """One API server. Its objects survive `stop` and `start`, and so does its port."""

    def __init__(
        self,
        *,
        namespace: str = "default",
        token: str = "",
        tls: ssl.SSLContext | None = None,
        ca: str = "",
        bookmarks: float = 60.0,
        history: int = 20_000,
    ) -> None:
        """`token`: demanded from everybody. `tls` and `ca`: the server's context, and the PEM that clients need for it.

        `bookmarks`: seconds between two of them. `history`: changes after which the oldest are forgotten.
        """
        self.namespace = namespace
        self.store = KubernetesStore(history=history)
        self.pods = Pods(self.store, namespace)
        self.token = token
        self.allowed: set[tuple[str, str, str]] | None = None
        """rights (API group, resource, verb) of everybody; None: all"""
        self.calls: list[Call] = []
        """the last ten thousand"""
        self.delays: dict[str, float] = {}
        """verb → seconds before it is done; what was begun is done even if its client leaves"""
        self.watches = WatchState(bookmarks=bookmarks)
        """how watches behave; `watches.open` counts them"""
        self._tls = tls
        self._ca = ca
        self._faults: list[_Fault] = []
        self._pages: dict[str, tuple[int, list[Object]]] = {}
        self._server: web.Server | None = None
        self._listener: asyncio.Server | None = None
        self._port = 0
        self._answering = asyncio.Event()
        self._answering.set()
        self._tasks: set[asyncio.Task[Any]] = set()

    # -- life

    async def start(self) -> None:
        """Listen; on the same port as before."""
        self._server = web.Server(self._handle, handler_cancellation=True)
        self._listener = await asyncio.get_running_loop().create_server(
            self._server, "127.0.0.1", self._port, ssl=self._tls, reuse_address=True, backlog=1024
        )
        self._port = self._listener.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Break every connection and listen no more. Idempotent."""
        listener, self._listener = self._listener, None
        server, self._server = self._server, None
        if listener is None or server is None:
            return
        listener.close()
        self.close_watches()
        for task in tuple(self._tasks):
            task.cancel()
        await server.shutdown(timeout=0.1)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        """The same after a restart."""
        return self._port

    def kubeconfig(self, **user: str) -> str:
        """A kubeconfig, as JSON; `user` is what its user has, by default the server's token."""
        cluster: Object = {"server": self.url}
        if self._ca:
            cluster["certificate-authority-data"] = base64.b64encode(self._ca.encode()).decode()
        found = user or ({"token": self.token} if self.token else {})
        return json.dumps(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{"name": "emulated", "cluster": cluster}],
                "users": [{"name": "tester", "user": found}],
                "contexts": [
                    {"name": "test", "context": {"cluster": "emulated", "user": "tester", "namespace": self.namespace}}
                ],
                "current-context": "test",
            }
        )

    def service_account(self, directory: Path) -> None:
        """Write the files that a pod finds about its service account. Blocks for a moment."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in (("token", self.token), ("ca.crt", self._ca), ("namespace", self.namespace)):
            (directory / name).write_text(text, "ascii")

    def set_tls(self, tls: ssl.SSLContext | None, ca: str) -> None:
        """Another certificate, from the next `start` on."""
        self._tls, self._ca = tls, ca

    # -- what a test looks at

    def counted(self) -> Counter[tuple[str, str]]:
        """How often each verb was used on each resource."""
        return Counter((call.verb, call.plural) for call in self.calls)

    def metadata(self, name: str) -> Object | None:
        """A metadata object as stored."""
        return self.store.objects.get((METADATA.plural, self.namespace, name))

    def put_metadata(self, name: str, data: Mapping[str, Mapping[str, Any]], *, uid: str = "") -> None:
        """Write a metadata object past everybody's back; `uid`: of the pod that owns it."""
        metadata: Object = {"name": name}
        if uid:
            metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Pod", "name": name, "uid": uid}]
        full: Object = {"endpoints": {}, "model_cards": {}, "event_channels": {}, **data}
        self.store.put(METADATA, self.namespace, {"metadata": metadata, "spec": {"data": full}})

    # -- faults

    def fail(self, code: int, *, times: int = 1, retry_after: int | None = None, verbs: Collection[str] = ()) -> None:
        """Answer the next `times` requests (of these verbs: list, watch, patch, delete) with `code`."""
        self._faults.append(_Fault(code=code, times=times, retry_after=retry_after, verbs=verbs))

    def heal(self) -> None:
        """No more faults from `fail`, `stall` and `hang`."""
        self._faults.clear()
        self.watches.stalled = False
        self._answering.set()

    def stall(self) -> None:
        """Watches say nothing any more, bookmarks included, and neither do they end."""
        self.watches.stalled = True

    def hang(self) -> None:
        """Requests are taken and never answered, as by a server that was stopped. Watches stall."""
        self.watches.stalled = True
        self._answering.clear()

    def close_watches(self) -> None:
        """End every watch, without a word."""
        self.watches.ended += 1

    def expire_watches(self) -> None:
        """Forget the history and tell those who watch, as a compaction does to those who are behind."""
        self.store.compact()
        self.watches.expired += 1

    def lose_everything(self) -> None:
        """Come back without any object and with versions that start again, as after a restore from nothing."""
        self.store.empty()
        self.pods.forget()

    def forget_pages(self) -> None:
        """Lists that are under way cannot go on."""
        self._pages.clear()

    # -- requests

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            return await self._answer(request)
        except Refused as refused:
            headers = {"Retry-After": str(refused.retry_after)} if refused.retry_after is not None else {}
            return _json(refused.status(), status=refused.code, headers=headers)
        finally:
            self._tasks.discard(task)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        resource, call = _parse(request)
        self.calls.append(call)
        del self.calls[:-10_000]
        await self._answering.wait()
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            raise Refused(401, "Unauthorized")
        self._check_right(call.right)
        self._check_faults(call.verb)
        match call.verb:
            case "list":
                return self._list(resource, call)
            case "watch":
                return await self._watch(request, resource, call)
            case "get":
                return _json(self._existing(call))
            case "patch":
                body = await _body(request)
                return await self._begin(call, lambda: self._apply(request, resource, call, body))
            case "delete":
                body = await _body(request)
                return await self._begin(call, lambda: self._delete(call, body))
            case _:
                raise Refused(405, "the server does not allow this method on the requested resource")

    async def _begin(self, call: Call, work: Callable[[], web.Response]) -> web.Response:
        delay = self.delays.get(call.verb, 0.0)
        if not delay:
            return work()
        done: asyncio.Future[web.Response] = asyncio.get_running_loop().create_future()

        def do() -> None:
            try:
                response = work()
                if not done.done():
                    done.set_result(response)
            except Refused as refused:
                if not done.done():
                    done.set_exception(refused)

        asyncio.get_running_loop().call_later(delay, do)
        return await done

    def _check_right(self, right: tuple[str, str, str]) -> None:
        if self.allowed is not None and right not in self.allowed:
            group, plural, verb = right
            raise Refused(
                403,
                f'{plural}{f".{group}" if group else ""} is forbidden: User "system:serviceaccount:{self.namespace}:stator" cannot '
                f'{verb} resource "{plural}" in API group "{group}" in the namespace "{self.namespace}"',
            )

    def _check_faults(self, verb: str) -> None:
        for fault in self._faults:
            if not fault.verbs or verb in fault.verbs:
                fault.times -= 1
                if not fault.times:
                    self._faults.remove(fault)
                raise Refused(fault.code, "this failure was asked for", retry_after=fault.retry_after)

    def _existing(self, call: Call) -> Object:
        found = self.store.objects.get((call.plural, call.namespace, call.name))
        if found is None:
            raise Refused(404, f'{call.plural} "{call.name}" not found')
        return found

    # -- list

    def _list(self, resource: Resource, call: Call) -> web.Response:
        token = call.query.get("continue", "")
        limit = int(call.query.get("limit", "0"))
        if token:
            if token not in self._pages:
                raise Refused(410, "The provided continue parameter is too old to display a consistent list result.")
            revision, objects = self._pages.pop(token)
        else:
            revision = self.store.revision
            objects = self.store.select(call.plural, call.namespace, call.query.get("labelSelector", ""))
        metadata: Object = {"resourceVersion": str(revision)}
        if limit and len(objects) > limit:
            metadata["continue"] = f"page+{revision}/{len(self._pages)}=="
            metadata["remainingItemCount"] = len(objects) - limit
            self._pages[metadata["continue"]] = (revision, objects[limit:])
            objects = objects[:limit]
        return _json(
            {"kind": f"{resource.kind}List", "apiVersion": resource.api_version, "metadata": metadata, "items": objects}
        )

    # -- watch

    async def _watch(self, request: web.BaseRequest, resource: Resource, call: Call) -> web.StreamResponse:
        text = call.query.get("resourceVersion", "")
        revision = int(text or 0)
        if revision > self.store.revision:
            raise Refused(504, f"Too large resource version: {revision}, current: {self.store.revision}", retry_after=1)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        self.watches.open += 1
        try:
            await Watcher(self.store, self.watches, resource, call, response).run(revision)
        finally:
            self.watches.open -= 1
        return response

    # -- apply and delete

    def _apply(self, request: web.BaseRequest, resource: Resource, call: Call, body: bytes) -> web.Response:
        if request.content_type != "application/apply-patch+yaml":
            raise Refused(415, f"the body of the request was in an unknown format: {request.content_type}")
        manager = call.query.get("fieldManager", "")
        if not manager:
            raise Refused(400, "fieldManager is required for apply patch")
        config = _config(body, resource, call)
        key = (call.plural, call.namespace, call.name)
        live = self.store.objects.get(key)
        if live is None:
            self._check_right((call.group, call.plural, "create"))
        bare: Object = json.loads(json.dumps(live)) if live else {"metadata": {"name": call.name}}
        bare["metadata"].pop("managedFields", None)
        managers = self.store.managers.get(key, {})
        try:
            result, after = apply(bare, managers, config, manager=manager, force=call.query.get("force") == "true")
        except ApplyConflict as conflict:
            raise Refused(409, f"Apply failed with {len(conflict.conflicts)} conflicts: {conflict}") from conflict
        result["metadata"]["managedFields"] = fields_of_managers(after, resource.api_version)
        self.store.managers[key] = after
        stored = self.store.put(resource, call.namespace, result)
        return _json(stored, status=200 if live else 201)

    def _delete(self, call: Call, body: bytes) -> web.Response:
        uid = self._existing(call)["metadata"]["uid"]
        options: Object = json.loads(body) if body else {}
        preconditions: Object = options.get("preconditions") or {}
        wanted = preconditions.get("uid")
        if wanted and wanted != uid:
            raise Refused(409, f"Precondition failed: UID in precondition: {wanted}, UID in object meta: {uid}")
        self.store.delete(call.plural, call.namespace, call.name)
        return _json({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": {"uid": uid}})


def _parse(request: web.BaseRequest) -> tuple[Resource, Call]:
    """`/api/v1/namespaces/{ns}/{plural}[/{name}]` or `/apis/{group}/{version}/…`."""
    parts = request.path.strip("/").split("/")
    group = "" if parts[0] == "api" else parts[1] if len(parts) > 1 else ""
    rest = parts[1:] if parts[0] == "api" else parts[2:]
    query = dict(request.query)
    if len(rest) not in (4, 5) or rest[1] != "namespaces":
        raise Refused(404, "the server could not find the requested resource")
    version, _, namespace, plural, *name = rest
    resource = next((each for each in RESOURCES if (each.group, each.version, each.plural) == (group, version, plural)), None)
    if resource is None:
        raise Refused(404, "the server could not find the requested resource")
    watching = query.get("watch", "") in ("1", "true")
    verb = {"GET": "get" if name else "watch" if watching else "list", "PATCH": "patch", "DELETE": "delete"}.get(
        request.method, request.method.lower()
    )
    return resource, Call(verb=verb, group=group, plural=plural, namespace=namespace, name=name[0] if name else "", query=query)


async def _body(request: web.BaseRequest) -> bytes:
    body = bytearray()
    async for chunk in request.content.iter_any():
        body += chunk
    if len(body) > _MAX_BODY:
        raise Refused(413, f"Request entity too large: limit is {_MAX_BODY}")
    return bytes(body)


def _config(body: bytes, resource: Resource, call: Call) -> Object:
    """What is to be applied; the emulation takes JSON, which is YAML, too."""
    try:
        found: Any = json.loads(body)
    except ValueError as error:
        raise Refused(400, f"error decoding YAML: {error}") from error
    config = cast(Object, found) if isinstance(found, dict) else {}
    if (config.get("apiVersion"), config.get("kind")) != (resource.api_version, resource.kind):
        raise Refused(400, f"the body is no {resource.kind} of {resource.api_version}")
    metadata: Object = config.get("metadata") or {}
    if metadata.get("name") != call.name or metadata.get("namespace", call.namespace) != call.namespace:
        raise Refused(400, "the name or namespace of the object does not match the one in the URL")
    if "managedFields" in metadata:
        raise Refused(400, "metadata.managedFields must be nil")
    return config


def _json(value: Object, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status,
        body=json.dumps(value, separators=(",", ":")).encode(),
        headers={**(headers or {}), "Content-Type": "application/json"},
    )
