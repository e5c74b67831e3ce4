"""Server-side apply, as API servers do it: who said which field, conflicts, force, and what goes with whom.

A field is a path of keys. Lists are taken as a whole, but for `metadata.ownerReferences`, whose entries go by their uid.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, cast

__all__ = ["ApplyConflict", "Managers", "apply", "fields_of_managers"]

Path = tuple[str, ...]
Object = dict[str, Any]
Managers = dict[str, frozenset[Path]]
"""manager → the fields it applied last"""

_IDENTITY = {("apiVersion",), ("kind",), ("metadata", "name"), ("metadata", "namespace")}
_OWNERS = ("metadata", "ownerReferences")


class ApplyConflict(Exception):
    """Another manager has said something else about these fields."""

    def __init__(self, conflicts: list[tuple[str, Path]]) -> None:
        super().__init__("; ".join(f'conflict with "{manager}": .{".".join(path)}' for manager, path in conflicts))
        self.conflicts = conflicts


def apply(
    live: Object, managers: Mapping[str, frozenset[Path]], config: Object, *, manager: str, force: bool
) -> tuple[Object, Managers]:
    """The object after `manager` applied `config` to `live`, and who manages what then. Neither argument is changed."""
    result = _with_owner_table(deepcopy(live))
    wanted = {path: value for path, value in _leaves(_with_owner_table(deepcopy(config)), ()) if path not in _IDENTITY}
    conflicts = [
        (other, path)
        for other, paths in managers.items()
        if other != manager
        for path in paths & wanted.keys()
        if _get(result, path) != wanted[path]
    ]
    if conflicts and not force:
        raise ApplyConflict(conflicts)
    lost = {path for _, path in conflicts}
    after: Managers = {other: paths - lost for other, paths in managers.items() if other != manager}
    kept = frozenset[Path]().union(*after.values())
    for path in managers.get(manager, frozenset()) - wanted.keys() - kept:
        _remove(result, path)
    for path, value in wanted.items():
        _set(result, path, value)
    after[manager] = frozenset(wanted)
    return _with_owner_list(result), {name: paths for name, paths in after.items() if paths}


def fields_of_managers(managers: Mapping[str, frozenset[Path]], version: str) -> list[Object]:
    """`metadata.managedFields`."""
    entries: list[Object] = []
    for manager, paths in managers.items():
        fields: Object = {}
        for path in sorted(paths):
            place = fields
            for key in path:
                place = place.setdefault(f"f:{key}", {})
        entries.append(
            {"manager": manager, "operation": "Apply", "apiVersion": version, "fieldsType": "FieldsV1", "fieldsV1": fields}
        )
    return entries


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Values that are no tables, and empty tables."""
    if isinstance(value, dict) and value:
        for key, inner in cast(Object, value).items():
            yield from _leaves(inner, (*path, key))
    else:
        yield path, cast(Any, value)


def _get(value: Any, path: Path) -> Any:
    for key in path:
        value = cast(Object, value).get(key) if isinstance(value, dict) else None
    return value


def _set(place: Object, path: Path, value: Any) -> None:
    for key in path[:-1]:
        if not isinstance(place.get(key), dict):
            place[key] = {}
        place = place[key]
    if value != {} or not isinstance(place.get(path[-1]), dict):
        place[path[-1]] = value


def _remove(place: Object, path: Path) -> None:
    """Remove a field, and the tables that it leaves empty."""
    first, *rest = path
    if not rest:
        place.pop(first, None)
    elif isinstance(place.get(first), dict):
        inner: Object = place[first]
        _remove(inner, tuple(rest))
        if not inner:
            del place[first]


def _with_owner_table(object: Object) -> Object:
    owners = _get(object, _OWNERS)
    if isinstance(owners, list):
        table = {str(owner.get("uid")): owner for owner in cast(list[Object], owners)}
        object["metadata"]["ownerReferences"] = table
    return object


def _with_owner_list(object: Object) -> Object:
    owners = _get(object, _OWNERS)
    if isinstance(owners, dict):
        object["metadata"]["ownerReferences"] = list(cast(Object, owners).values())
    return object
