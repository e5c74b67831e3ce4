"""Settings of routing."""

from typing import Annotated

from stator.config import Config, Setting
from stator.errors import ConfigError
from stator.routing.policy import normal_name

__all__ = ["RoutingConfig"]


class RoutingConfig(Config, frozen=True, kw_only=True):
    """How instances are chosen, avoided and retried."""

    section = "routing"

    policy: Annotated[
        str,
        Setting(doc="how clients choose when they do not say", dyn="DYN_ROUTER_MODE", dyn_read=normal_name),
    ] = "round_robin"
    device_ratio: Annotated[
        int,
        Setting(
            doc="device_weighted: CPU instances that one accelerator counts for", dyn="DYN_ENCODER_CUDA_TO_CPU_RATIO", ge=1
        ),
    ] = 8
    inhibit_first: Annotated[float, Setting(doc="how long an instance is avoided after a failure; doubles", unit="s", gt=0)] = (
        5.0
    )
    inhibit_most: Annotated[float, Setting(doc="longest avoidance after repeated failures", unit="s", gt=0)] = 60.0
    overloaded_for: Annotated[
        float,
        Setting(
            doc="how long an instance that refused as overloaded comes last in the choice, unless a request there ends before",
            unit="s",
            gt=0,
        ),
    ] = 1.0
    slots_factor: Annotated[
        float,
        Setting(
            doc="requests given to a worker at once, in multiples of what its card says it runs (max_num_seqs of each rank); 0: any number",
            ge=0,
        ),
    ] = 1.0
    retry_ratio: Annotated[float, Setting(doc="retries allowed per request, on average", ge=0, le=1)] = 0.2
    retry_rate: Annotated[float, Setting(doc="retries allowed per second beside that", ge=0)] = 10.0
    attempts: Annotated[int, Setting(doc="instances that one request may try", ge=1, le=256)] = 16

    def limit_of(self, slots: int | None) -> int | None:
        """How many requests a worker that runs `slots` at once is given; None: any number."""
        if slots is None or slots < 1 or not self.slots_factor:
            return None
        return max(1, int(slots * self.slots_factor))

    def check(self) -> None:
        if self.inhibit_first > self.inhibit_most:
            raise ConfigError(f"inhibit_first = {self.inhibit_first} is above inhibit_most = {self.inhibit_most}")
