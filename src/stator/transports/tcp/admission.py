"""How many requests a worker answers at once (`spec/10 §1.6`): slots, and a queue in front of them."""

from collections import deque
from collections.abc import Callable

__all__ = ["Admission"]


class Admission:
    """Slots for running requests and a bounded first-in-first-out queue. One per process, over all endpoints.

    Whoever was started must `release` its slot exactly once, when its answer has ended.
    """

    def __init__(self, *, slots: int, queue: int) -> None:
        self._slots = slots
        self._room = queue
        self._running = 0
        self._starting = False
        self._queue: deque[Callable[[], None]] = deque()

    @property
    def running(self) -> int:
        """Slots in use."""
        return self._running

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._queue)

    def take(self) -> bool:
        """Take a slot if one is free."""
        if self._running >= self._slots:
            return False
        self._running += 1
        return True

    def wait(self, start: Callable[[], None]) -> bool:
        """Queue `start`, to be called with a slot of its own; False when the queue is full."""
        if len(self._queue) >= self._room:
            return False
        self._queue.append(start)
        return True

    def release(self) -> None:
        """An answer ended: its slot goes to the next in the queue. One that ends while it is started is not a recursion."""
        self._running -= 1
        if self._starting:
            return
        self._starting = True
        try:
            while self._queue and self.take():
                self._queue.popleft()()
        finally:
            self._starting = False

    def clear(self) -> None:
        """Forget the queue."""
        self._queue.clear()
