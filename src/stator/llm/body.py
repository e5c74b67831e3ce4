"""Reading a JSON body into a struct, with errors in the words OpenAI's own API uses.

The good path is one decode. Only a body that failed is looked at a second time, to find out which parameter to name.
"""

from typing import Any, NamedTuple, TypeVar

import msgspec

from stator.errors import UsageError

__all__ = ["Allowed", "InvalidRequest", "check_ranges", "read_body"]

T = TypeVar("T", bound=msgspec.Struct)


class InvalidRequest(UsageError):
    """A client's request that cannot be served as it is.

    `param` names the parameter at fault (None: none in particular), `openai_code` is the machine-readable code in OpenAI's
    error object (None: it has none), `status` is the HTTP status.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.openai_code = code
        self.status = status


class Allowed(NamedTuple):
    """A closed interval; None is unbounded."""

    low: float | None
    high: float | None


def check_ranges(request: msgspec.Struct, ranges: dict[str, Allowed]) -> None:
    """Raise `InvalidRequest` for the first field of `request` that is set and outside its interval."""
    for name, allowed in ranges.items():
        value = getattr(request, name)
        if value is None:
            continue
        kind = "integer" if isinstance(value, int) else "decimal"
        # Written so that a NaN would fail too.
        if allowed.high is not None and not value <= allowed.high:
            raise _outside(name, value, kind, "above maximum value", f"<= {allowed.high}", "above_max_value")
        if allowed.low is not None and not value >= allowed.low:
            raise _outside(name, value, kind, "below minimum value", f">= {allowed.low}", "below_min_value")


def _outside(name: str, value: object, kind: str, fault: str, expected: str, code: str) -> InvalidRequest:
    message = f"Invalid '{name}': {kind} {fault}. Expected a value {expected}, but got {value} instead."
    return InvalidRequest(message, param=name, code=f"{kind}_{code}")


def read_body(body: bytes, decoder: msgspec.json.Decoder[T], kind: type[T]) -> T:
    """Decode `body`; `InvalidRequest` says which parameter is missing, unknown or of the wrong type."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        try:
            explained = _explain(body, kind)
        except RecursionError:
            explained = InvalidRequest("The JSON body of your request is nested too deeply.")
        raise explained from error


def _explain(body: bytes, kind: type[msgspec.Struct]) -> InvalidRequest:
    try:
        given = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        return InvalidRequest("The body of your request must be a JSON object.")
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return InvalidRequest(f"We could not parse the JSON body of your request: {error}.")
    fields = {field.encode_name: field for field in msgspec.structs.fields(kind)}
    unknown = [name for name in given if name not in fields]
    if unknown:
        listed = ", ".join(f"'{name[:64]}'" for name in unknown[:16])
        noun = "parameter" if len(unknown) == 1 else "parameters"
        return InvalidRequest(f"Unknown {noun}: {listed}.", param=unknown[0][:64], code="unknown_parameter")
    for name, raw in given.items():
        fault = _fault(raw, fields[name].type)
        if fault:
            return InvalidRequest(f"Invalid value for '{name}': {fault}.", param=name, code="invalid_type")
    for name, field in fields.items():
        if field.required and name not in given:
            message = f"Missing required parameter: '{name}'."
            return InvalidRequest(message, param=name, code="missing_required_parameter")
    return InvalidRequest("We could not read the body of your request.")


def _fault(raw: msgspec.Raw, kind: Any) -> str:
    """What is wrong with one value, in msgspec's words; "" if nothing."""
    try:
        msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        text = str(error)
        return text[:1].lower() + text[1:].replace(" - at `$", " - at `…")
    return ""
