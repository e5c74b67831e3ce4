"""A process' membership in a cluster."""

import asyncio
import importlib
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from random import Random, SystemRandom
from typing import Any, cast

import msgspec

from stator import settings
from stator.clock import Clock
from stator.discovery.interface import Discovery
from stator.discovery.memory import MemoryDiscovery, MemoryStore
from stator.errors import UsageError
from stator.events import EventHost, EventPlane, EventsConfig, MemoryBus
from stator.health import EngineRoutes, HealthConfig, SystemHealth
from stator.protocol.ids import EndpointId
from stator.protocol.records import ModelRecord
from stator.routing import Policy, RoutingConfig
from stator.runtime.admission import Admission, AdmissionConfig
from stator.runtime.component import Component, Endpoint, Namespace, make_policy
from stator.runtime.config import RuntimeConfig
from stator.runtime.discovery_choice import choose_discovery, discovery_name
from stator.runtime.engine import Generate
from stator.runtime.event_plane import OpenEvents, choose_event_plane
from stator.runtime.host import advertised_host, raise_file_limit, socket_directory, warn_of_open_doors
from stator.runtime.meter import ProcessMeter
from stator.runtime.network import Network, PlaneChoice, choose_planes
from stator.runtime.plugins import check_settings, load_plugin
from stator.runtime.served import ServedEndpoint
from stator.runtime.services import RequestIds, Services, ViewsObserver
from stator.runtime.signals import shutdown_event
from stator.runtime.view import InstanceView
from stator.security import Tls, TlsConfig
from stator.tasks import DeadlineWheel, Scope, SystemClock
from stator.telemetry import LoopDelay, MetricsLevel
from stator.transports.memory import MemoryNetwork, MemoryPlane
from stator.transports.plane import PlaneHost

__all__ = ["Runtime"]

logger = logging.getLogger(__name__)


class Runtime:
    """Made by `Runtime.connect`. One per process is the usual; several may live on one event loop (tests do)."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._components: dict[tuple[str, str], Component] = {}

    @classmethod
    @asynccontextmanager
    async def connect(
        cls,
        *,
        discovery: str | MemoryStore | None = None,
        plane: str | MemoryNetwork | None = None,
        event_plane: str | MemoryBus | None = None,
        clock: Clock | None = None,
        random: Random | None = None,
        **overrides: Any,
    ) -> "AsyncGenerator[Runtime, None]":
        """Join the cluster inside the block; leaving it drains what is served, leaves discovery and closes every connection. Left by
        an exception or cancelled, it does not wait for running requests.

        Settings: arguments > `STATOR_*` > `DYN_*` > the file named by `STATOR_CONFIG` > defaults. Arguments are fields of
        `RuntimeConfig`, or `section__field` for another section (`native__port=7000`). `discovery`, `plane` and `event_plane` may also
        be shared in-memory objects, so that several runtimes of one process form a cluster; sharing a `MemoryStore` they hear each
        other's events too. Nothing process-wide is touched but the limit of open files. Raises `ConfigError` for settings,
        `Unavailable` or `ConnectFailed` when the cluster cannot be joined.
        """
        own = {name: value for name, value in overrides.items() if "__" not in name}
        sections = {name.replace("__", ".", 1): value for name, value in overrides.items() if "__" in name}
        if isinstance(discovery, str):
            own["discovery"] = discovery
        if isinstance(plane, str):
            own["plane"] = plane
        if isinstance(event_plane, str):
            own["event_plane"] = event_plane
        clock, random = clock or SystemClock(), random or Random(SystemRandom().getrandbits(128))
        prepared = await asyncio.to_thread(_prepare, discovery, plane, event_plane, own, sections, clock)
        config, planes, tls = prepared.config, prepared.planes, prepared.tls
        advertised = advertised_host(config, tls)
        warn_of_open_doors(config, tls)
        raise_file_limit()
        async with AsyncExitStack() as stack:
            found = await stack.enter_async_context(
                _open_discovery(discovery, config, sections, clock, Random(SystemRandom().getrandbits(128)))
            )
            views: dict[EndpointId, InstanceView] = {}
            wheel = DeadlineWheel(asyncio.get_running_loop())
            stack.callback(wheel.close)
            meter = ProcessMeter(
                MetricsLevel.runtime(worker_id=found.instance_id),
                Admission(prepared.admission),
                clock,
                instance=found.instance_id,
            )
            host = PlaneHost(
                process=f"{random.getrandbits(128):032x}",
                bind_host=config.host,
                advertise_host=advertised,
                socket_directory=await asyncio.to_thread(socket_directory),
                wheel=wheel,
                clock=clock,
                random=random,
                observer=ViewsObserver(views),
                tls=tls,
                secret=config.cluster_secret,
                refusals=meter.refusals,
                traffic=meter.traffic,
                input_timeout=config.input_timeout,
                overrides=sections,
            )
            stack.callback(meter.log.close)
            health = prepared.health
            state = SystemHealth(
                clock=_LoopClock(wheel, clock),
                starting_status=health.starting_status,
                listed=health.endpoints,
                canary=health.canary,
            )
            uptime = meter.root.create_gauge("uptime_seconds", "Total uptime of the DistributedRuntime in seconds")
            meter.root.on_update(lambda: uptime.set(state.uptime))
            delay = LoopDelay(meter.root, _LoopClock(wheel, clock), prefix="stator")
            delay.start(wheel.loop)
            stack.callback(delay.stop)
            engine_routes = EngineRoutes()
            status = None
            if health.port >= 0:
                from stator.health.server import StatusServer  # brings an HTTP server along

                page = meter.root.exposition
                status = StatusServer(
                    health,
                    state,
                    metrics=page,
                    metadata=getattr(found, "metadata", lambda: None),  # only Kubernetes keeps a process' records together
                    engine=engine_routes,
                    drain=lambda: runtime.drain(),
                    resume=lambda: runtime.resume(),
                )
                await stack.enter_async_context(status)
            network = Network(planes, host, retry=config.native_retry)
            stack.push_async_callback(network.aclose)
            events = prepared.open_events(
                EventHost(
                    discovery=found,
                    clock=clock,
                    random=Random(SystemRandom().getrandbits(128)),
                    config=prepared.events,
                    bind_host=config.host,
                    advertise_host=host.advertise_host,
                )
            )
            stack.push_async_callback(events.aclose)
            scope = await stack.enter_async_context(Scope("runtime"))
            if tls is not None:
                scope.spawn(tls.follow(), name="certificates")
            services = Services(
                config=config,
                routing=prepared.routing,
                discovery=found,
                events=events,
                network=network,
                wheel=wheel,
                scope=scope,
                clock=clock,
                random=random,
                new_id=RequestIds(random),
                closing=asyncio.Event(),
                views=views,
                served={},
                meter=meter,
                health=state,
                health_config=health,
                engine_routes=engine_routes,
                status=status,
            )
            program = shutdown_event()
            if program is not None:  # the end of one runtime is not the end of the program, the other way round it is
                scope.spawn(_follow(program, services.closing), name="signals")
            runtime = cls(services)
            stack.push_async_exit(runtime._leave)
            yield runtime

    async def _leave(self, kind: type[BaseException] | None, *_: object) -> None:
        """Drain what is still served; end it at once when the block was left by an exception."""
        self.shutdown()
        timeout = self._services.config.shutdown_timeout if kind is None else 0.0
        async with asyncio.TaskGroup() as group:
            for served in tuple(self._services.served.values()):
                group.create_task(served.finish(timeout))

    # -- names

    def namespace(self, name: str) -> Namespace:
        """The namespace `name` (dotted for nested ones)."""
        return Namespace(self._services, name, self._components)

    def endpoint(self, path: str) -> Endpoint:
        """The endpoint at `namespace.component.endpoint`, with or without `dyn://`. Raises `UsageError` for anything else."""
        id = EndpointId.parse(path)
        return self.namespace(id.namespace).component(id.component).endpoint(id.name)

    def policy(self, name: str | None = None) -> Policy:
        """A new routing policy, for a client of its own; default: the setting. Raises `UsageError` for an unknown name."""
        return make_policy(name, self._services.routing)

    # -- this process

    @property
    def instance_id(self) -> int:
        """The id all records of this process carry."""
        return self._services.discovery.instance_id

    @property
    def discovery(self) -> Discovery:
        """Who is there."""
        return self._services.discovery

    @property
    def events(self) -> EventPlane:
        """Messages by topic, to everybody who listens. Nothing is opened before the first publisher or subscription."""
        return self._services.events

    @property
    def config(self) -> RuntimeConfig:
        """The settings in force."""
        return self._services.config

    @property
    def metrics(self) -> MetricsLevel:
        """The metrics of the process; its `exposition()` is the page that the status server shows."""
        return self._services.meter.root

    @property
    def health(self) -> SystemHealth:
        """How this process and its endpoints are. A program without canary says it itself: `health.set_system(True)`."""
        return self._services.health

    @property
    def engine_routes(self) -> EngineRoutes:
        """Callbacks for the operator, under `/engine/` of the status server."""
        return self._services.engine_routes

    @property
    def status_url(self) -> str | None:
        """Where the status server answers; None if it does not (`health.port`)."""
        status = self._services.status
        return None if status is None else status.url

    async def drain(self) -> dict[str, Any]:
        """Take this process out of service without ending it: its endpoints leave discovery and refuse what still comes, running
        requests go on. Says how many there are. `resume` undoes it. Raises what discovery raises.
        """
        served = tuple(self._services.served.values())
        for each in served:
            await each.leave()
        return {"status": "draining", "inflight": sum(each.inflight for each in served)}

    async def resume(self) -> dict[str, Any]:
        """Into service again. Raises `UsageError` once the runtime is shutting down, and what discovery raises."""
        if self._services.closing.is_set():
            raise UsageError("the runtime is shutting down and comes back no more; start another process")
        for each in tuple(self._services.served.values()):
            await each.enter()
        return {"status": "serving"}

    def shutdown(self) -> None:
        """Begin to leave: every `serve` drains and returns. Idempotent."""
        self._services.closing.set()

    async def wait_for_shutdown(self) -> None:
        """Wait until someone called `shutdown`, or a signal did under `stator.run`."""
        await self._services.closing.wait()

    # -- what a worker needs (`stator.worker.worker.WorkerHost`)

    async def serve(
        self, endpoint: EndpointId, generate: Generate, *, slots: int | None = None, **options: Any
    ) -> ServedEndpoint:
        """Begin to serve; the caller ends it. `options` are those of `Endpoint.start`.

        `slots`: requests that are answered at once where the operator has set no limit (`Admission.suggest`).
        """
        if slots is not None:
            self._services.meter.admission.suggest(slots)
        return await Endpoint(self._services, endpoint).start(generate, **options)

    async def publish(self, record: ModelRecord) -> None:
        """Put a model card into discovery."""
        await self._services.discovery.register(record)

    async def withdraw(self, record: ModelRecord) -> None:
        """Take it out again."""
        await self._services.discovery.unregister(record.key)


class _Prepared(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a runtime's parts, and its planes."""

    config: RuntimeConfig
    routing: RoutingConfig
    admission: AdmissionConfig
    health: HealthConfig
    planes: PlaneChoice
    tls: Tls | None
    events: EventsConfig
    open_events: OpenEvents


def _prepare(
    discovery: str | MemoryStore | None,
    plane: str | MemoryNetwork | None,
    event_plane: str | MemoryBus | None,
    own: Mapping[str, Any],
    sections: Mapping[str, Any],
    clock: Clock,
) -> _Prepared:
    """All that reads the disk: the settings file, what is installed, the modules of the planes. Not for the event loop."""
    check_settings()
    config = settings.load(RuntimeConfig, own)
    health = settings.load(HealthConfig, _of_section("health", sections))
    if health.port >= 0:
        importlib.import_module("stator.health.server")
    tls = settings.load(TlsConfig, _of_section("tls", sections))
    return _Prepared(
        config=config,
        routing=settings.load(RoutingConfig, _of_section("routing", sections)),
        admission=settings.load(AdmissionConfig, _of_section("admission", sections)),
        health=health,
        planes=_planes(plane, config),
        tls=Tls(tls, clock=clock) if tls.enabled else None,
        events=settings.load(EventsConfig, _of_section("events", sections)),
        open_events=choose_event_plane(
            event_plane if isinstance(event_plane, MemoryBus) else config.event_plane,
            in_memory=isinstance(discovery, MemoryStore) or discovery_name(config.discovery) == "memory",
            sections=sections,
        ),
    )


class _LoopClock:
    """Time as the event loop counts it, which deadlines are on."""

    def __init__(self, wheel: DeadlineWheel, clock: Clock) -> None:
        self.monotonic = wheel.now
        self.wall = clock.wall


async def _follow(program: asyncio.Event, closing: asyncio.Event) -> None:
    await program.wait()
    closing.set()


def _planes(plane: str | MemoryNetwork | None, config: RuntimeConfig) -> PlaneChoice:
    if isinstance(plane, MemoryNetwork) or config.plane == "memory":
        network = plane if isinstance(plane, MemoryNetwork) else MemoryNetwork()
        return PlaneChoice(planes=(MemoryPlane(network),), fall_back=False)
    if config.closed and config.request_plane != "tcp":
        logger.info("request_plane = %s is not used: a cluster secret is set, and compatible is not", config.request_plane)
    return choose_planes(
        config.plane,
        config.request_plane,
        lambda name: load_plugin("stator.transports", name),
        secret=config.cluster_secret is not None,
        closed=config.closed,
    )


@asynccontextmanager
async def _open_discovery(
    given: str | MemoryStore | None, config: RuntimeConfig, sections: Mapping[str, Any], clock: Clock, random: Random
) -> AsyncGenerator[Discovery, None]:
    if isinstance(given, MemoryStore):
        opened: Any = MemoryDiscovery(given, clock=clock, random=random)
    else:
        factory, own = await asyncio.to_thread(choose_discovery, config.discovery, sections)
        opened = factory(own, clock=clock, random=random)
    async with opened as discovery:
        yield cast(Discovery, discovery)


def _of_section(section: str, overrides: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(f"{section}."): value for key, value in overrides.items() if key.startswith(f"{section}.")}
