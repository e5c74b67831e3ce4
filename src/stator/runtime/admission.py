"""How many requests a worker answers at once (`spec/10 §1.6`): slots, and a queue in front of them."""

from collections import OrderedDict
from typing import Annotated, ClassVar, Protocol

from stator.config import Config, Setting
from stator.errors import Overloaded

__all__ = ["Admission", "AdmissionConfig", "Waiting"]


class AdmissionConfig(Config, frozen=True, kw_only=True):
    """Limits of a worker process, over all of its endpoints and planes."""

    section: ClassVar[str] = "admission"

    slots: Annotated[
        int | None,
        Setting(
            doc="requests answered at once; none: what the engine declares (max_num_seqs), else pool_slots, with pool_queue",
            ge=1,
            dyn="DYN_ENGINE_REQUEST_LIMIT",
        ),
    ] = None
    queue: Annotated[
        int,
        Setting(
            doc="requests that wait for one of slots before others are refused", ge=0, dyn="DYN_DYNAMO_REQUEST_QUEUE_LIMIT"
        ),
    ] = 16
    pool_slots: Annotated[
        int, Setting(doc="requests answered at once where slots is not set", ge=1, dyn="DYN_TCP_WORKER_POOL_SIZE")
    ] = 10_000
    pool_queue: Annotated[int, Setting(doc="requests that wait for one of pool_slots", ge=0, dyn="DYN_TCP_WORK_QUEUE_SIZE")] = (
        40_000
    )

    @property
    def limits(self) -> tuple[int, int]:
        """Slots and queue in force."""
        return (self.pool_slots, self.pool_queue) if self.slots is None else (self.slots, self.queue)


class Waiting(Protocol):
    """Who waits for a slot."""

    def begin(self) -> None:
        """You have one. Must not raise."""
        ...


class Admission:
    """Slots for running requests and a bounded first-in-first-out queue. One per process, over all endpoints.

    Whoever took a slot, or was told to `begin`, must `release` it exactly once.
    """

    def __init__(self, config: AdmissionConfig) -> None:
        self.slots, self.room = config.limits
        self.limited = config.slots is not None
        """whether the engine's own limit is in force"""
        self._queue_limit = config.queue
        self._decided = config.limits != AdmissionConfig().limits
        self._suggested = 0
        self.running = 0
        """slots in use"""
        self._handing_out = False
        self._queue: OrderedDict[Waiting, None] = OrderedDict()

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether a request that came now would be refused."""
        return self.running >= self.slots and len(self._queue) >= self.room

    def suggest(self, slots: int) -> None:
        """An engine of this process answers so many requests at once; `queue` more may wait. What the operator has set stands.

        Several engines of one process share the sum.
        """
        if not self._decided:
            self._suggested += slots
            self.slots, self.room, self.limited = self._suggested, self._queue_limit, True

    def take(self) -> bool:
        """Take a slot if one is free."""
        if self.running >= self.slots:
            return False
        self.running += 1
        return True

    def wait(self, who: Waiting) -> None:
        """Queue `who`, to `begin` with a slot of its own. Raises `Overloaded`, which names the limits, when the queue is full."""
        if len(self._queue) >= self.room:
            limit, queue = ("admission.slots", "queue") if self.limited else ("admission.pool_slots", "pool_queue")
            if self._suggested:
                limit = "the engine's max_num_seqs"
            raise Overloaded(
                f"worker at capacity: {self.running} requests run ({limit} = {self.slots}) and "
                f"{len(self._queue)} wait (admission.{queue} = {self.room})"
            )
        self._queue[who] = None

    def leave(self, who: Waiting) -> bool:
        """`who` waits no longer; False if it did not."""
        if who in self._queue:
            del self._queue[who]
            return True
        return False

    def release(self) -> None:
        """A request ended: its slot goes to the next in the queue. One that ends while it begins is not a recursion."""
        self.running -= 1
        if self._handing_out:
            return
        self._handing_out = True
        try:
            while self._queue and self.take():
                self._queue.popitem(last=False)[0].begin()
        finally:
            self._handing_out = False
