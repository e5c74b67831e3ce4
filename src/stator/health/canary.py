"""The canary of one endpoint: a request of our own when nobody else asked for a while."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from random import Random
from typing import Any
from uuid import UUID

import msgspec

from stator.errors import Overloaded
from stator.health.canary_schedule import CanarySchedule, Step, Verdict
from stator.health.config import HealthConfig
from stator.health.status import Activity, EndpointState, SystemHealth, Target
from stator.protocol.annotated import Annotated
from stator.tasks import DeadlineWheel, Scope, Timed
from stator.telemetry import Counter, Family, MetricSet

__all__ = ["Canary", "Probe", "canary_outcomes", "item_problem"]

logger = logging.getLogger(__name__)

Probe = Callable[[Any, str], AsyncIterator[Any]]
"""`probe(payload, context_id)`: the whole answer of the endpoint, in process. Its normal end is the sentinel; anything cut raises."""

_MOST_ITEMS = 10_000
"""an answer of this many items has no end: the canary's payload asks for a short one"""


def item_problem(item: Any) -> str:
    """What is wrong with one item of an answer; "" if nothing is. Default of `Canary`."""
    if isinstance(item, Annotated) and item.event == "error":
        return f"error item: {'; '.join(item.comment) if item.comment else 'no message'}"
    return ""


def canary_outcomes(metrics: MetricSet) -> Family[Counter]:
    """What the canaries of a process count together: probes by endpoint and outcome. Raises `UsageError` if it is there already."""
    help = "Canary probes that ended or were given up, by outcome"
    return metrics.counters("stator_canary_probes_total", help, ("endpoint", "outcome"))


class _Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """`problem` is "" for a whole and good answer; `full`: refused, because the endpoint is at capacity."""

    problem: str
    full: bool = False


def random_ids(random: Random) -> Callable[[], str]:
    """Request ids as everybody's: version 4 UUIDs."""
    return lambda: str(UUID(int=random.getrandbits(128), version=4))


class Canary:
    """Probes `target` through `probe` and tells `health`. `start` it when the endpoint takes requests, `stop` it before it closes.

    Time is the wheel's, which must be on the clock of `health`. Probes run in `scope`, one at a time; whoever closes the scope ends them.
    `busy` says whether the endpoint's admission is full. `outcomes` are made by `canary_outcomes`.
    """

    def __init__(
        self,
        target: Target,
        *,
        health: SystemHealth,
        probe: Probe,
        config: HealthConfig,
        wheel: DeadlineWheel,
        scope: Scope,
        busy: Callable[[], bool] = lambda: False,
        problem_of: Callable[[Any], str] = item_problem,
        new_id: Callable[[], str] | None = None,
        outcomes: Family[Counter] | None = None,
    ) -> None:
        self.slot: set[Timed] | None = None
        self._target = target
        self._health = health
        self._activity = health.activity(target.endpoint) or Activity(target.endpoint, health, wheel.now)
        self._probe = probe
        self._timeout = config.canary_timeout
        self._wheel = wheel
        self._scope = scope
        self._busy = busy
        self._problem_of = problem_of
        self._new_id = new_id or random_ids(Random())
        self._schedule = CanarySchedule(
            wait=config.canary_wait, timeout=config.canary_timeout, busy_limit=config.canary_busy_limit, now=wheel.now()
        )
        self._wait = config.canary_wait
        self._task: asyncio.Task[_Outcome] | None = None
        self._stopped = False
        self._outcomes = outcomes if outcomes is not None else canary_outcomes(MetricSet())

    @property
    def probing(self) -> bool:
        """Whether a probe has not ended."""
        return self._schedule.probing

    def start(self) -> None:
        """Count silence from now on."""
        self._wheel.arm(self, self._wheel.now() + self._wait)

    def stop(self) -> None:
        """No more probes; a running one is cancelled and says nothing any more. Idempotent."""
        self._stopped = True
        self._wheel.disarm(self)
        if self._task is not None:
            self._task.cancel()

    def expire(self, now: float) -> float:
        """Called by the wheel: probe, give up or go on waiting. Returns when to be asked again; 0.0 ends it."""
        if self._stopped or self._scope.closed:
            return 0.0
        step, again = self._schedule.step(now, self._activity.last)
        if step is Step.PROBE:
            task = self._scope.spawn(self._ask(), name=f"canary of {self._target.endpoint}")
            self._task = task
            task.add_done_callback(self._ended)
        elif step is Step.GIVE_UP:
            self._judge(now, _Outcome(problem=f"no whole answer within {self._timeout} s", full=self._is_busy()))
            if self._task is not None:
                self._task.cancel()
        return again

    async def _ask(self) -> _Outcome:
        """One probe. Never raises but for cancellation; the answer's clean-up has run."""
        try:
            return _Outcome(problem=await self._read(self._probe(self._target.payload, self._new_id())))
        except Overloaded as error:
            return _Outcome(problem=f"refused: {error}", full=True)
        except (Exception, SystemExit) as error:
            return _Outcome(problem=f"{type(error).__name__}: {error}")

    async def _read(self, answer: AsyncIterator[Any]) -> str:
        """Read to the end; the first problem is returned."""
        count = 0
        try:
            async for item in answer:
                count += 1
                if problem := self._problem_of(item):
                    return problem
                if count >= _MOST_ITEMS:
                    return f"the answer has {_MOST_ITEMS} items and no end"
        finally:
            aclose = getattr(answer, "aclose", None)
            if aclose is not None:
                await aclose()
        return "" if count else "the answer ended without an item"

    def _ended(self, task: asyncio.Task[_Outcome]) -> None:
        self._task = None
        if self._stopped or self._scope.closed:
            return
        now = self._wheel.now()
        if not self._schedule.given_up:
            self._judge(now, _outcome(task))
        self._wheel.arm(self, self._schedule.ended(now, self._activity.last))

    def _is_busy(self) -> bool:
        try:
            return self._busy()
        except Exception:
            logger.exception("whether %s is busy cannot be told", self._target.endpoint)
            return False

    def _judge(self, now: float, outcome: _Outcome) -> None:
        endpoint = self._target.endpoint
        verdict = self._schedule.judge(now, self._activity.last, failed=bool(outcome.problem), full=outcome.full)
        self._outcomes.labels(endpoint, verdict.value).inc()
        if verdict is Verdict.HEALTHY:
            self._report(EndpointState.READY, "answered a canary")
        elif verdict is Verdict.SICK:
            self._report(EndpointState.SICK, f"canary: {outcome.problem}")
        else:
            logger.debug("canary of %s failed and does not count, %s: %s", endpoint, verdict.value, outcome.problem)

    def _report(self, state: EndpointState, reason: str) -> None:
        if self._health.state(self._target.endpoint) is not None:  # else it was removed before its canary was stopped
            self._health.set_endpoint(self._target.endpoint, state, reason)


def _outcome(task: asyncio.Task[_Outcome]) -> _Outcome:
    if task.cancelled():
        return _Outcome(problem="the handler cancelled itself")
    error = task.exception()  # GeneratorExit and the like: nothing an answer may raise
    return task.result() if error is None else _Outcome(problem=f"{type(error).__name__}: {error}")
