"""Tasks and time: supervised scopes, the deadline wheel, backoff, the real clock."""

from stator.tasks.backoff import Backoff
from stator.tasks.scope import Scope
from stator.tasks.system_clock import SystemClock
from stator.tasks.wheel import DeadlineWheel, Timed

__all__ = ["Backoff", "DeadlineWheel", "Scope", "SystemClock", "Timed"]
