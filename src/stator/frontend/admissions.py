"""The gates of all models of one frontend."""

from collections.abc import Callable

from stator.frontend.admission_limits import AdmissionLimits
from stator.frontend.admission_metrics import AdmissionMetrics
from stator.frontend.caller import Caller
from stator.frontend.gate import Admission, Gate, Refuse
from stator.frontend.permit import Priority
from stator.llm.served import ServedModel, TokenEngine
from stator.tasks import DeadlineWheel

__all__ = ["Admissions"]

_MOST = 1000
"""idle gates that are kept"""


class Admissions:
    """One `Gate` per engine: models whose workers differ have several engines. Gates of engines that are gone are dropped when idle."""

    def __init__(
        self,
        limits: AdmissionLimits,
        *,
        metrics: AdmissionMetrics,
        now: Callable[[], float],
        wheel: Callable[[], DeadlineWheel],
        refuse: Refuse,
    ) -> None:
        self._limits = limits
        self._metrics = metrics
        self._now = now
        self._wheel = wheel
        self._refuse = refuse
        self._gates: dict[int, tuple[TokenEngine, Gate]] = {}
        """by the identity of their engine, which is kept alive so that no other gets it"""
        self._closing: Callable[[], Exception] | None = None

    def __len__(self) -> int:
        return len(self._gates)

    def enter(self, served: ServedModel, caller: Caller, *, calls: int) -> Admission:
        """Let a request in, or let it wait; see `Gate.enter`."""
        found = self._gates.get(id(served.engine))
        return (self._open(served) if found is None else found[1]).enter(caller, calls)

    def _open(self, served: ServedModel) -> Gate:
        for key, (_, gate) in list(self._gates.items()):
            if gate.idle and (gate.is_deserted or len(self._gates) >= _MOST):
                gate.forget()
                del self._gates[key]
        gate = Gate(
            served,
            self._limits,
            metrics=self._metrics,
            now=self._now,
            wheel=self._wheel(),
            refuse=self._refuse,
        )
        gate.closing = self._closing
        self._gates[id(served.engine)] = served.engine, gate
        return gate

    def show(self) -> None:
        """Bring the metrics up to date."""
        waiting: dict[tuple[str, Priority], int] = {}
        for _, gate in self._gates.values():
            for priority in Priority:
                key = gate.model, priority
                waiting[key] = waiting.get(key, 0) + gate.queue.waiting_of(priority)
        self._metrics.show(waiting)

    def dismiss(self, error: Callable[[], Exception]) -> None:
        """No request waits any more to begin: those who do are refused, and who comes later if it would have to."""
        self._closing = error
        for _, gate in self._gates.values():
            gate.dismiss(error)

    def aclose(self) -> None:
        """Stop listening to engines."""
        for _, gate in self._gates.values():
            gate.forget()
        self._gates.clear()
