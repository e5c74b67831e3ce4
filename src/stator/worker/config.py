"""Where a worker serves, and how long its end may take."""

from typing import Annotated, ClassVar

from stator.config import Config, Setting
from stator.protocol.ids import EndpointId

__all__ = ["WorkerConfig"]


def _grace_period(text: str) -> float:
    """Negative counts as 0 (`spec/25 §1.3`)."""
    return max(0.0, float(text))


class WorkerConfig(Config, frozen=True, kw_only=True):
    """Settings of one worker. At its end come, in this order: grace period, drain, clean-up; each has its own limit."""

    section: ClassVar[str] = "worker"

    namespace: Annotated[str, Setting(doc="namespace to serve in", dyn="DYN_NAMESPACE")] = "dynamo"
    component: Annotated[str, Setting(doc="component to serve as", dyn="DYN_COMPONENT")] = "backend"
    endpoint: Annotated[str, Setting(doc="endpoint name", dyn="DYN_ENDPOINT")] = "generate"
    served_name: Annotated[str, Setting(doc="name clients ask for; empty: the model's own")] = ""
    enable_kv_events: Annotated[
        bool, Setting(doc="publish the KV events of the engine, for routers that know which worker has which prefix")
    ] = True
    health_payload: Annotated[
        str,
        Setting(
            doc="request the canary sends: a JSON object, or @ and the path of a file with one; empty: the engine's own",
            dyn="DYN_HEALTH_CHECK_PAYLOAD",
        ),
    ] = ""
    grace_period: Annotated[
        float,
        Setting(
            doc="time between leaving discovery and refusing requests, for clients that have not noticed yet",
            unit="s",
            ge=0,
            dyn="DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS",
            dyn_read=_grace_period,
            on_bad_dyn="default",
        ),
    ] = 5.0
    drain_timeout: Annotated[
        float,
        Setting(
            doc="time running requests have to end before they are killed",
            unit="s",
            ge=0,
            dyn="DYN_WORKER_GRACEFUL_SHUTDOWN_TIMEOUT",
            on_bad_dyn="default",
        ),
    ] = 30.0
    cleanup_timeout: Annotated[float, Setting(doc="time the engine has to free everything", unit="s", gt=0)] = 30.0

    @property
    def endpoint_id(self) -> EndpointId:
        return EndpointId(self.namespace, self.component, self.endpoint)

    def check(self) -> None:
        EndpointId(self.namespace, self.component, self.endpoint)
