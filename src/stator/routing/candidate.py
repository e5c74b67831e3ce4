"""What a policy chooses from."""

import msgspec

__all__ = ["Candidate"]


class Candidate(msgspec.Struct, kw_only=True, eq=False, gc=False):
    """One instance of the endpoint, as far as choosing is concerned.

    There is one object per instance and process, made and counted by `Occupancy` and shared by everybody who chooses, so that
    `load` is the present number of requests in flight and no table is looked up. Two candidates are equal only if they are one.
    """

    instance_id: int
    device_type: str = ""
    """"cpu", "cuda" or "" where the record does not say"""
    load: int = 0
    """requests of this process in flight; written by `Occupancy` alone"""
    limit: int | None = None
    """requests it is given at once; None: any number. Whoever chooses asks again among those with room when it met one without"""

    @property
    def has_room(self) -> bool:
        """Whether it may be given another request."""
        return self.limit is None or self.load < self.limit
