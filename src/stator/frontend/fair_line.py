"""One line of waiting calls, in the order that is fair between tenants.

Start-time fair queueing (Goyal et al.): each tenant has a *tag* that counts its calls, the *clock* is the tag of the call let in last,
and the tenant with the lowest tag is next. A tenant that used less than its share while others used more has a lower tag and goes first
until it has caught up; what it may save up that way is bounded by `CREDIT` calls. Who was never seen begins at the clock: a new name
brings no advantage.
"""

from collections import OrderedDict

from stator.frontend.permit import CallGroup, Permit

__all__ = ["CREDIT", "FairLine"]

CREDIT = 32
"""calls that a tenant may be behind the clock: so many it may send at once after it was quiet"""


class _Tenant:
    __slots__ = ("permits", "tag")

    def __init__(self, tag: int) -> None:
        self.tag = tag
        """of its first waiting call; those behind it have the numbers that follow"""
        self.permits: OrderedDict[Permit, None] = OrderedDict()


class FairLine:
    """Permits that wait, by tenant. Calls let in without waiting are charged as well. At most `remembered` idle tenants are known."""

    def __init__(self, remembered: int) -> None:
        self.waiting = 0
        self._remembered = remembered
        self._clock = 0
        self._active: dict[str, _Tenant] = {}
        """those with waiting calls"""
        self._idle: OrderedDict[str, int] = OrderedDict()
        """the tags of the others, least recently used first"""

    def __len__(self) -> int:
        return self.waiting

    @property
    def tenants(self) -> int:
        """How many tenants have waiting calls."""
        return len(self._active)

    @property
    def known(self) -> int:
        """How many tenants are remembered, waiting or not."""
        return len(self._active) + len(self._idle)

    def held(self, tenant: str) -> int:
        """How many calls of `tenant` wait."""
        active = self._active.get(tenant)
        return 0 if active is None else len(active.permits)

    def position(self, tenant: str) -> int:
        """Where one more call of `tenant` would be: 1 is next. Counts the calls before it and itself; O(tenants that wait)."""
        tag = self._next_tag(tenant)
        ahead = 0
        for name, other in self._active.items():
            held = len(other.permits)
            ahead += held if name == tenant else min(held, max(0, tag - other.tag + 1))
        return ahead + 1

    def is_owed(self, tenant: str) -> bool:
        """Whether one more call of `tenant` would still be within its share."""
        return self._next_tag(tenant) < self._clock

    def _next_tag(self, tenant: str) -> int:
        active = self._active.get(tenant)
        return self._fresh_tag(tenant) if active is None else active.tag + len(active.permits)

    def _fresh_tag(self, tenant: str) -> int:
        return max(self._idle.get(tenant, self._clock), self._clock - CREDIT)

    # -- in and out

    def charge(self, tenant: str, calls: int) -> None:
        """So many calls of `tenant` go on without waiting; nobody waits."""
        tag = self._fresh_tag(tenant) + calls
        self._clock = max(self._clock, tag - 1)
        self._rest(tenant, tag)

    def add(self, permit: Permit) -> None:
        """It waits, behind the others of its tenant."""
        self._of(permit.group).permits[permit] = None
        self.waiting += 1

    def put_back(self, permit: Permit) -> None:
        """One that was taken out waits again, before the others of its tenant, and is not charged twice."""
        tenant = self._of(permit.group)
        tenant.permits[permit] = None
        tenant.permits.move_to_end(permit, last=False)
        tenant.tag -= 1
        self.waiting += 1

    def take(self) -> Permit:
        """The next one, taken out and charged. There must be one."""
        active = self._active
        name = min(active, key=lambda name: active[name].tag) if len(active) > 1 else next(iter(active))
        tenant = active[name]
        permit, _ = tenant.permits.popitem(last=False)
        self._clock = max(self._clock, tenant.tag)
        tenant.tag += 1
        self._left(name, tenant)
        return permit

    def remove(self, permit: Permit) -> None:
        """It waits no longer, and is not charged."""
        name = permit.group.tenant
        tenant = self._active[name]
        del tenant.permits[permit]
        self._left(name, tenant)

    def permits(self) -> list[Permit]:
        """All that wait."""
        return [permit for tenant in self._active.values() for permit in tenant.permits]

    def _of(self, group: CallGroup) -> _Tenant:
        tenant = self._active.get(group.tenant)
        if tenant is None:
            tenant = self._active[group.tenant] = _Tenant(self._fresh_tag(group.tenant))
            self._idle.pop(group.tenant, None)
        return tenant

    def _left(self, name: str, tenant: _Tenant) -> None:
        self.waiting -= 1
        if not tenant.permits:
            del self._active[name]
            self._rest(name, tenant.tag)

    def _rest(self, tenant: str, tag: int) -> None:
        idle = self._idle
        idle[tenant] = tag
        idle.move_to_end(tenant)
        if len(idle) > self._remembered:
            idle.popitem(last=False)
