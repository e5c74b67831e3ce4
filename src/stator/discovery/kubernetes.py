"""Kubernetes discovery: each process keeps its records in a custom resource, and readiness says who is alive
(`spec/20 §4.4`, `docs/kubernetes.md`).

The layout is the reference's, so that its processes are seen and see ours. While the API server is away, what is known stays.
"""

import asyncio
import importlib
import logging
from collections.abc import Mapping
from random import Random
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import quote

import msgspec

from stator.clock import Clock
from stator.discovery.interface import DiscoveryStatus
from stator.discovery.kubernetes_access import Credentials, find_access
from stator.discovery.kubernetes_config import KubernetesConfig
from stator.discovery.kubernetes_guard import Guard
from stator.discovery.kubernetes_identity import Identity, instance_id_of, read_identity
from stator.discovery.kubernetes_kubeconfig import Access
from stator.discovery.kubernetes_objects import Metadata, maps_of, metadata_object, read_metadata, read_pod, read_slice
from stator.discovery.kubernetes_problem import ApiProblem
from stator.discovery.kubernetes_reflector import Collection, Reflector
from stator.discovery.kubernetes_writer import MetadataWriter
from stator.discovery.model_conflict import check_model, models_beside
from stator.discovery.view import View
from stator.discovery.watch import Watch
from stator.errors import ConfigError, Unavailable, UsageError
from stator.protocol.records import EventChannelRecord, ModelRecord, Query, Record, RecordKey
from stator.tasks import Scope

if TYPE_CHECKING:
    from stator.discovery.kubernetes_client import KubernetesClient

__all__ = ["KubernetesConfig", "KubernetesDiscovery", "open_kubernetes"]

logger = logging.getLogger(__name__)

_SELECTOR = "nvidia.com/dynamo-discovery-enabled=true"
_OWN = "own records"
_CATCH_UP = 1.0
"""seconds until a list is asked for what the watch should have told by then"""
_BRIEF = 0.5
"""seconds that a removal waits for a server which is known not to answer; it goes on without being waited for"""


class KubernetesDiscovery:
    """`stator.discovery.Discovery` over the API server of a cluster. No wait for it is longer than `answer_timeout`."""

    def __init__(self, config: KubernetesConfig, *, clock: Clock, random: Random) -> None:
        self._config = config
        self._clock = clock
        self._random = random
        self._view = View()
        self._owned: dict[RecordKey, Record] = {}
        self._status = DiscoveryStatus(backend="kubernetes")
        self._problems: dict[str, str] = {}
        self._state = "new"
        self._scope = Scope("kubernetes discovery")
        self._farewells = Scope("kubernetes discovery closing")
        self._farewell: asyncio.Task[None] | None = None
        self._client: KubernetesClient | None = None
        self._identity: Identity | None = None
        self._instance_id = random.getrandbits(53)
        self._timer: asyncio.TimerHandle | None = None
        self._metadata: Reflector[Metadata]
        self._readiness: Reflector[frozenset[str]]
        self._writer: MetadataWriter
        self._guard: Guard

    @property
    def instance_id(self) -> int:
        return self._instance_id

    @property
    def status(self) -> DiscoveryStatus:
        return self._status

    def metadata(self) -> dict[str, dict[str, Record]]:
        """What this process has registered, as its metadata object has it: the answer to `GET /metadata` of the status server."""
        return maps_of(self._owned.values())

    # -- registering

    async def register(self, record: Record) -> bool:
        identity = self._check_open()
        identity.check_can_register()
        key = record.key
        if isinstance(record, ModelRecord):
            self._check_model(record)
        if key in self._owned:
            return False
        if record.instance_id != self._instance_id and not isinstance(record, EventChannelRecord):
            await self._sync(self._metadata)  # ids like ours nobody else has
            if key in self._owned:
                return False
        if any(key in records for records in self._others()):
            raise UsageError(f"discovery key {key} is registered by another owner")
        self._check_open()
        self._owned[key] = record
        try:
            await self._applied(self._writer.touch())
            if isinstance(record, ModelRecord):
                await self._catch_up()
                self._check_model(record)
        except (UsageError, ApiProblem, TimeoutError) as error:
            if self._owned.pop(key, None) is not None and self._state == "open":
                await self._try_applied(self._writer.touch(), f"record {key} is removed again")
            if isinstance(error, UsageError):
                raise
            reason = self._status.reason or str(error) or f"no answer within {self._config.answer_timeout:g} s"
            raise Unavailable(f"cannot register {key}: {reason}") from error
        return True

    async def unregister(self, key: RecordKey) -> bool:
        self._check_open()
        if self._owned.pop(key, None) is None:
            return False
        await self._try_applied(self._writer.touch(), f"record {key} is removed")
        return True

    def owned(self) -> Mapping[RecordKey, Record]:
        return MappingProxyType(self._owned)

    def _check_model(self, record: ModelRecord) -> None:
        query = models_beside(record)
        mine = [other for key, other in self._owned.items() if query.matches(key)]
        others = [other for records in self._others() for key, other in records.items() if query.matches(key)]
        check_model(record, [*mine, *others])

    def _others(self) -> "list[dict[RecordKey, Record]]":
        """What ready processes other than this one have registered, without waiting for the debounce."""
        own = self._identity.name if self._identity is not None else ""
        return [records for name, records in self._ready_records() if name != own]

    async def _applied(self, change: int, patience: float | None = None) -> None:
        async with asyncio.timeout(self._config.answer_timeout if patience is None else patience):
            await self._writer.applied(change)

    async def _catch_up(self) -> None:
        """Wait until all is known that others had written when the server took our last apply."""
        try:
            async with asyncio.timeout(min(_CATCH_UP, self._config.answer_timeout)):
                await self._metadata.reach(self._writer.version, since=self._writer.applied_at)
        except TimeoutError:
            await self._sync(self._metadata)

    async def _try_applied(self, change: int, what: str) -> None:
        try:
            await self._applied(change, None if self._status.connected else min(_BRIEF, self._config.answer_timeout))
        except (ApiProblem, TimeoutError):
            logger.warning("%s when %s answers", what, self._status.location)

    # -- reading

    async def list(self, query: Query) -> list[Record]:
        self._check_open()
        await self._sync_all()
        return [*self._view.select(query).values()]

    def watch(self, query: Query) -> Watch:
        return self._view.watch(query, self._sync_all)

    async def last_seen(self, query: Query) -> dict[RecordKey, float]:
        await self._sync_all()
        stale = self._status.stale_since
        return dict.fromkeys(self._view.select(query), self._clock.wall() if stale is None else stale)

    async def _sync_all(self) -> None:
        """Bring the view up to date, as far as the API server answers."""
        self._check_open()
        if self._status.connected:
            try:
                async with asyncio.timeout(self._config.answer_timeout):
                    await self._writer.applied()
            except (ApiProblem, TimeoutError):
                pass  # what could not be written is in the log and in the status
        await self._sync(self._metadata, self._readiness)
        self._publish()

    async def _sync(self, *reflectors: "Reflector[Metadata] | Reflector[frozenset[str]]") -> None:
        """Let them list anew, as far as the API server answers."""
        try:
            async with asyncio.timeout(self._config.answer_timeout), asyncio.TaskGroup() as group:
                for reflector in reflectors:
                    group.create_task(reflector.sync())
        except TimeoutError:
            logger.warning("discovery answers what it knew: %s does not answer", self._status.location)

    # -- what is true

    def _ready_records(self) -> "list[tuple[str, dict[RecordKey, Record]]]":
        """The metadata of ready processes, ordered by name: of two that claim a key the first one has it."""
        ready = frozenset[str]().union(*(names for _, names in self._readiness.items.values()))
        return [(name, item.records) for name, (_, item) in sorted(self._metadata.items.items()) if name in ready]

    def _changed(self) -> None:
        """Publish soon: changes come in crowds. Our own object is looked after at once: it may be back before others miss it."""
        if self._state == "open":
            self._guard.check()
        if self._timer is None and self._state in ("opening", "open"):
            self._timer = asyncio.get_running_loop().call_later(self._config.debounce, self._publish)

    def _publish(self) -> None:
        """Make the view what the API server said last."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._state not in ("opening", "open") or not (self._metadata.synced and self._readiness.synced):
            return
        wanted: dict[RecordKey, Record] = {}
        for _, records in self._ready_records():
            for key, record in records.items():
                wanted.setdefault(key, record)
        known = self._view.records
        changes: dict[RecordKey, Record | None] = {key: None for key in known if key not in wanted}
        for key, record in wanted.items():
            before = known.get(key)
            if before is not record and before != record:
                changes[key] = record
        self._view.apply(changes)
        self._guard.check()

    def _tell(self, source: str, problem: ApiProblem | None) -> None:
        """Keep the status: stale as long as one of our parts is not served. That we may not write makes nothing stale."""
        before = self._status
        if problem is None or (source == _OWN and problem.lasting):
            self._problems.pop(source, None)
        else:
            self._problems[source] = str(problem)
        reason = "; ".join(f"{name}: {text}" for name, text in sorted(self._problems.items()))
        since = (self._clock.wall() if before.stale_since is None else before.stale_since) if reason else None
        self._status = msgspec.structs.replace(before, stale_since=since, reason=reason)
        if before.connected and not self._status.connected:
            logger.warning("%s does not serve us, what is known stays: %s", before.location, reason)
        elif self._status.connected and not before.connected:
            logger.info("%s serves us again", before.location)

    # -- opening and closing

    async def __aenter__(self) -> Self:
        if self._state != "new":
            raise UsageError("a discovery is opened once")
        self._state = "opening"
        try:
            await self._open()
        except BaseException:
            await self.aclose()
            raise
        return self

    async def _open(self) -> None:
        module = await asyncio.to_thread(importlib.import_module, "stator.discovery.kubernetes_client")
        access, credentials, identity = await asyncio.to_thread(self._prepare)
        self._identity = identity
        if identity.pod:
            self._instance_id = instance_id_of(identity.name)
        self._status = msgspec.structs.replace(self._status, location=f"{access.server} namespace {identity.namespace}")
        self._client = client = module.KubernetesClient(
            access.server,
            credentials,
            server_name=access.server_name,
            timeout=self._config.answer_timeout,
            clock=self._clock,
        )
        self._make_parts(client, identity)
        self._scope.spawn(self._metadata.run(), name="follow worker metadata")
        self._scope.spawn(self._readiness.run(), name="follow readiness")
        self._scope.spawn(self._writer.run(), name="apply worker metadata")
        await self._first_answers(identity)
        self._publish()
        self._state = "open"

    def _prepare(self) -> tuple[Access, Credentials, Identity]:
        """All that reads files."""
        access = find_access(self._config)
        identity = read_identity(self._config, access.namespace)
        credentials = Credentials(access)
        credentials.current()
        return access, credentials, identity

    def _make_parts(self, client: "KubernetesClient", identity: Identity) -> None:
        namespace = quote(identity.namespace, safe="")
        objects = f"/apis/nvidia.com/v1alpha1/namespaces/{namespace}/dynamoworkermetadatas"
        self._metadata = Reflector(
            client,
            Collection(what="dynamoworkermetadatas.nvidia.com", path=objects),
            config=self._config,
            random=self._random,
            read=read_metadata,
            changed=self._changed,
            tell=lambda problem: self._tell("metadata", problem),
        )
        if self._config.mode == "container":
            readiness = Collection(
                what="pods", path=f"/api/v1/namespaces/{namespace}/pods", params={"labelSelector": _SELECTOR}
            )
        else:
            readiness = Collection(
                what="endpointslices.discovery.k8s.io",
                path=f"/apis/discovery.k8s.io/v1/namespaces/{namespace}/endpointslices",
                params={"labelSelector": _SELECTOR},
            )
        self._readiness = Reflector(
            client,
            readiness,
            config=self._config,
            random=self._random,
            read=read_pod if self._config.mode == "container" else read_slice,
            changed=self._changed,
            tell=lambda problem: self._tell("readiness", problem),
        )
        self._writer = MetadataWriter(
            client,
            f"{objects}/{quote(identity.name, safe='')}",
            content=lambda: metadata_object(identity, self._owned.values()),
            tell=lambda problem: self._tell(_OWN, problem),
            random=self._random,
            clear_first=bool(identity.pod and identity.container),
        )
        self._guard = Guard(identity.name, writer=self._writer, metadata=self._metadata, owned=self._owned)

    async def _first_answers(self, identity: Identity) -> None:
        """Wait until both collections were listed. Raises `ConfigError` for what will not change by itself, else `Unavailable`."""
        try:
            async with asyncio.timeout(2 * self._config.answer_timeout):
                for reflector in (self._metadata, self._readiness):
                    while not reflector.synced:
                        if reflector.problem is not None and reflector.problem.lasting:
                            raise ConfigError(_advice(reflector.problem, self._status.location))
                        await reflector.attempt()
                if identity.pod and identity.container:
                    await self._writer.cleared.wait()
        except TimeoutError as error:
            reason = self._status.reason or "no answer"
            raise Unavailable(f"cannot open discovery at {self._status.location}: {reason}") from error

    async def aclose(self) -> None:
        if self._farewell is None:
            self._state = "closed"
            self._view.close()
            self._owned.clear()
            self._farewell = self._farewells.spawn(self._leave(), name="leave kubernetes")
        await asyncio.wait({self._farewell})

    async def _leave(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._client is None:
            return
        self._guard.close()
        try:
            async with asyncio.timeout(self._config.answer_timeout):
                await self._writer.close()
        except (ApiProblem, TimeoutError) as error:
            logger.warning("our DynamoWorkerMetadata stays until the pod is gone: %s", error or "no answer")
        finally:
            await self._scope.aclose()
            await self._client.aclose()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def _check_open(self) -> Identity:
        if self._state != "open" or self._identity is None:
            raise UsageError("the discovery is not open; enter it with `async with`")
        return self._identity


def _advice(problem: ApiProblem, location: str) -> str:
    hint = {
        401: "the token is not accepted",
        403: "allow it to the service account: deploy/kubernetes/rbac.yaml",
        404: "the custom resource is not installed: kubectl apply -f deploy/kubernetes/crd.yaml",
    }.get(problem.status, "see the API server's log")
    return f"cannot open discovery at {location}: {problem} ({hint})"


def open_kubernetes(config: KubernetesConfig, *, clock: Clock, random: Random) -> KubernetesDiscovery:
    """A discovery to be entered with `async with`. From there: `ConfigError` when it is not known where the API server is or who we
    are, or when the server refuses; `Unavailable` when it does not answer.
    """
    return KubernetesDiscovery(config, clock=clock, random=random)
