"""One served endpoint's part in the health of its process: its canary, and what its real answers say (`spec/25 §6`)."""

from collections.abc import Callable
from typing import Any

from stator.health import Activity, Canary, EndpointChange, EndpointState, HealthConfig, SystemHealth
from stator.runtime.meter import ProcessMeter
from stator.runtime.serving import Serving
from stator.tasks import DeadlineWheel, Scope
from stator.tasks.wheel import Timed

__all__ = ["Wellbeing"]

_LOOKS = 4
"""looks at the progress of long answers within the time after which a silent endpoint is probed"""


class _ProgressWatch:
    """Notes that items leave: looked at now and then, so that the token path has nothing to do with it."""

    def __init__(self, serving: Serving, activity: Activity, wheel: DeadlineWheel, *, every: float) -> None:
        self.slot: set[Timed] | None = None
        self._serving = serving
        self._activity = activity
        self._wheel = wheel
        self._every = every
        self._seen = serving.progress

    def start(self) -> None:
        """Look from now on."""
        self._wheel.arm(self, self._wheel.now() + self._every)

    def stop(self) -> None:
        """Look no more."""
        self._wheel.disarm(self)

    def expire(self, now: float) -> float:
        """Called by the wheel."""
        progress = self._serving.progress
        if progress > self._seen:
            self._activity.note()
        self._seen = progress
        return now + self._every


class Wellbeing:
    """From `start`, when the endpoint takes requests, to `close`. `changed(sick)` is told what discovery should know."""

    def __init__(
        self,
        name: str,
        *,
        health: SystemHealth,
        config: HealthConfig,
        serving: Serving,
        meter: ProcessMeter,
        wheel: DeadlineWheel,
        new_id: Callable[[], str],
        changed: Callable[[bool], None],
    ) -> None:
        self._name = name
        self._health = health
        self._config = config
        self._serving = serving
        self._meter = meter
        self._wheel = wheel
        self._new_id = new_id
        self._changed = changed
        self._scope = Scope(f"canary of {name}")
        self._canary: Canary | None = None
        self._watch: _ProgressWatch | None = None
        self._unsubscribe: Callable[[], None] = _nothing

    def start(self, payload: Any, instance_id: int) -> None:
        """The endpoint takes requests. With a `payload`, and where canaries are on, it is probed from now on."""
        health = self._health
        target = health.add(self._name, payload=payload, instance_id=instance_id)
        activity = health.activity(self._name)
        self._unsubscribe = health.subscribe(self._told)  # the program itself may find it sick, too
        if target is None or activity is None:
            return
        self._serving.on_success = activity.note
        self._watch = _ProgressWatch(self._serving, activity, self._wheel, every=self._config.canary_wait / _LOOKS)
        self._watch.start()
        self._canary = Canary(
            target,
            health=health,
            probe=self._serving.probe,
            config=self._config,
            wheel=self._wheel,
            scope=self._scope,
            busy=lambda: self._meter.admission.full,
            new_id=self._new_id,
            outcomes=self._meter.canaries,
        )
        self._canary.start()

    def _told(self, change: EndpointChange) -> None:
        if change.endpoint == self._name:
            self._changed(change.state is EndpointState.SICK)

    async def aclose(self) -> None:
        """The endpoint is no longer served; a running probe is cancelled. Idempotent."""
        self._unsubscribe()
        if self._watch is not None:
            self._watch.stop()
        if self._canary is not None:
            self._canary.stop()
        self._health.remove(self._name)
        await self._scope.aclose()


def _nothing() -> None: ...
