"""One endpoint serves one model: the rule that refuses a second one (`spec/20 §3`)."""

from collections.abc import Iterable

import msgspec

from stator.errors import UsageError
from stator.protocol.records import ModelRecord, Query, Record

__all__ = ["check_model", "models_beside"]


def models_beside(record: ModelRecord) -> Query:
    """The models registered on the same endpoint, by any instance."""
    return Query(record.bucket, record.endpoint_id.segments)


def check_model(record: ModelRecord, others: Iterable[Record]) -> None:
    """Raise `UsageError` if one of `others`, the models of the same endpoint, is a different model.

    Models differ by `display_name`; when one of the two is a LoRA adapter, by the base model (`source_path`).
    """
    for other in others:
        if not isinstance(other, ModelRecord):
            continue
        adapted = _is_adapter(record) or _is_adapter(other)
        mine, theirs = (_base(record), _base(other)) if adapted else (_name(record), _name(other))
        if mine != theirs:
            raise UsageError(
                f"cannot register model {mine!r} on endpoint {record.endpoint_id}: a different model {theirs!r} is already "
                f"registered there by instance {other.instance_id:x}; use another endpoint or stop that instance"
            )


def _is_adapter(record: ModelRecord) -> bool:
    return record.model_suffix is not msgspec.UNSET or record.card_json.get("lora") is not None


def _name(record: ModelRecord) -> object:
    return record.card_json.get("display_name")


def _base(record: ModelRecord) -> object:
    return record.card_json.get("source_path") or _name(record)
