"""Names and identifiers: endpoint ids, instance ids, paths, slugs (`spec/20 §1`)."""

import re
from functools import lru_cache

import msgspec

from stator.errors import UsageError

__all__ = ["EndpointId", "endpoint_path", "format_instance_id", "nats_subject", "parse_instance_id", "slug"]

_NOT_SLUG = re.compile(r"[^a-z0-9_-]")
_MAX_INSTANCE_ID = 2**64 - 1


class EndpointId(msgspec.Struct, frozen=True, order=True):
    """`namespace.component.name`. The namespace may be dotted (nested); component and name have no dot, nothing has a slash."""

    namespace: str
    component: str
    name: str

    def __post_init__(self) -> None:
        for label, value in (("component", self.component), ("endpoint", self.name)):
            if not value or "." in value or "/" in value:
                raise UsageError(f"{label} name {value!r} must be non-empty and without '.' or '/'")
        if not self.namespace or "/" in self.namespace or ".." in f".{self.namespace}.":
            raise UsageError(f"namespace {self.namespace!r} must be non-empty, without '/' and without empty parts")

    @classmethod
    def parse(cls, text: str) -> "EndpointId":
        """Read `namespace.component.endpoint`, with or without `dyn://`; `UsageError` otherwise."""
        namespace, *rest = text.removeprefix("dyn://").rsplit(".", 2)
        if len(rest) != 2:
            raise UsageError(
                f"invalid endpoint path {text!r}: expected 'namespace.component.endpoint' or 'dyn://namespace.component.endpoint'"
            )
        return cls(namespace, *rest)

    def __str__(self) -> str:
        return f"{self.namespace}.{self.component}.{self.name}"

    @property
    def url(self) -> str:
        """`dyn://namespace.component.name`, as health answers list it."""
        return f"dyn://{self}"

    @property
    def segments(self) -> tuple[str, str, str]:
        """The parts of a discovery key."""
        return (self.namespace, self.component, self.name)


def format_instance_id(instance_id: int) -> str:
    """Lower-case hex without padding: the form in keys, TCP paths, NATS subjects and metric labels."""
    if not 0 <= instance_id <= _MAX_INSTANCE_ID:
        raise UsageError(f"instance id {instance_id} is not an unsigned 64-bit number")
    return format(instance_id, "x")


def parse_instance_id(text: str) -> int:
    """Read hex of either case; `UsageError` when it is none or too long."""
    try:
        value = int(text, 16) if text and text[0] not in "+-" and "_" not in text and len(text) <= 18 else -1
    except ValueError:
        value = -1
    if not 0 <= value <= _MAX_INSTANCE_ID:
        raise UsageError(f"{text!r} is not the hex form of an instance id")
    return value


@lru_cache(maxsize=4096)
def endpoint_path(instance_id: int, endpoint: str) -> str:
    """The path a worker listens on: `{hex}/{endpoint}` (`spec/10 §1.1`)."""
    return f"{format_instance_id(instance_id)}/{endpoint}"


def nats_subject(endpoint: EndpointId, instance_id: int) -> str:
    """`{namespace}_{component}.{endpoint}-{hex}` with the raw names (`spec/10 §6`)."""
    return f"{endpoint.namespace}_{endpoint.component}.{endpoint.name}-{format_instance_id(instance_id)}"


def slug(name: str) -> str:
    """Lower case; anything outside `[a-z0-9_-]` becomes `_`; leading `_` removed (`spec/20 §1.4`)."""
    return _NOT_SLUG.sub("_", name.lower()).lstrip("_")
