"""The limits of the queue in front of the workers."""

import msgspec

__all__ = ["AdmissionLimits"]


class AdmissionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What `FrontendConfig` says under `queue_…`, where each has its explanation; times in seconds."""

    depth: int = 1024
    wait: float = 0.5
    target: float = 0.02
    burst: float = 0.1
    timeout: float = 10.0
    ageing: int = 8
    tenants: int = 1024
