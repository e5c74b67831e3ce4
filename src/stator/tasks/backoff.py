"""How long to wait before the next try."""

from random import Random

import msgspec

from stator.errors import ConfigError

__all__ = ["Backoff"]


class Backoff(msgspec.Struct, frozen=True, kw_only=True):
    """Doubling delays with jitter, in seconds: attempt n (from 0) waits between half of and all of min(first·2ⁿ, most)."""

    first: float = 0.1
    most: float = 5.0

    def __post_init__(self) -> None:
        if not 0 < self.first <= self.most:
            raise ConfigError(f"backoff needs 0 < first <= most, got first={self.first}, most={self.most}")

    def delay(self, attempt: int, random: Random) -> float:
        """Seconds to wait before attempt `attempt + 1`."""
        whole = min(self.first * 2.0 ** min(attempt, 60), self.most)
        return whole * (0.5 + random.random() / 2)
