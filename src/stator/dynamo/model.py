"""What a worker says of its model."""

from typing import Any, cast

import msgspec

from stator.dynamo.errors import InvalidType, InvalidValue
from stator.llm.card import DisaggregatedEndpoint, ModelCard, RuntimeConfig, card_from_json, card_to_json
from stator.llm.card import ModelType as CardType

__all__ = ["ModelDeploymentCard", "ModelRuntimeConfig", "ModelType"]


class ModelType:
    """What a model can be asked for; joined with `|`. Two with the same flags are equal, which they are not in the reference."""

    __slots__ = ("_flags",)

    Empty: "ModelType"
    Chat: "ModelType"
    Completions: "ModelType"
    Embedding: "ModelType"
    TensorBased: "ModelType"
    Prefill: "ModelType"
    Images: "ModelType"
    Audios: "ModelType"
    Videos: "ModelType"
    Realtime: "ModelType"

    def __init__(self, *flags: CardType) -> None:
        self._flags = frozenset(flags)

    @property
    def flags(self) -> tuple[CardType, ...]:
        """In the order of cards."""
        return tuple(flag for flag in CardType if flag in self._flags)

    def __or__(self, other: object) -> "ModelType":
        return ModelType(*self._flags, *other._flags) if isinstance(other, ModelType) else NotImplemented

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ModelType) and self._flags == other._flags

    def __hash__(self) -> int:
        return hash(self._flags)

    def __str__(self) -> str:
        return ",".join("tensor" if flag is CardType.TENSOR_BASED else flag.lower() for flag in self.flags)

    def __repr__(self) -> str:
        return f"ModelType({' | '.join(self.flags)})"

    def supports_chat(self) -> bool:
        """Whether chat is among the flags."""
        return CardType.CHAT in self._flags


ModelType.Empty = ModelType()
for _flag in CardType:
    setattr(ModelType, _flag.value, ModelType(_flag))


class ModelRuntimeConfig:
    """What a worker can do at run time. Attributes may be set one by one; they are checked when the model is registered."""

    __slots__ = (
        "_disaggregated",
        "_engine_specific",
        "_tags",
        "context_length",
        "data_parallel_size",
        "data_parallel_start_rank",
        "enable_eagle",
        "enable_local_indexer",
        "exclude_tools_when_tool_choice_none",
        "kv_transfer_domain",
        "kv_transfer_enforcement",
        "kv_transfer_preferred_weight",
        "max_num_batched_tokens",
        "max_num_seqs",
        "reasoning_parser",
        "stable_routing_id",
        "taints",
        "tokenizer_backend",
        "tool_call_parser",
        "topology_domains",
        "total_kv_blocks",
    )

    def __init__(self) -> None:
        self.context_length: int | None = None
        self.total_kv_blocks: int | None = None
        self.max_num_seqs: int | None = None
        self.max_num_batched_tokens: int | None = None
        self.tool_call_parser: str | None = None
        self.reasoning_parser: str | None = None
        self.tokenizer_backend: str | None = None
        self.exclude_tools_when_tool_choice_none = True
        self.data_parallel_start_rank = 0
        self.data_parallel_size = 1
        self.enable_local_indexer = True
        self.enable_eagle = False
        self.taints: set[str] = set()
        self.stable_routing_id: str | None = None
        self.topology_domains: dict[str, str] = {}
        self.kv_transfer_domain: str | None = None
        self.kv_transfer_enforcement: str | None = None
        self.kv_transfer_preferred_weight: float | None = None
        self._engine_specific: dict[str, str] = {}
        self._tags = {"mode": "off", "scope": "auto", "schema": "auto"}
        self._disaggregated: DisaggregatedEndpoint | None = None

    @property
    def runtime_data(self) -> dict[str, str]:
        """What `set_engine_specific` was given: key → JSON text. A copy."""
        return dict(self._engine_specific)

    def set_engine_specific(self, key: str, value: str) -> None:
        """Keep a value of the engine's own, given as JSON text. Raises `TypeError` for no text, `ValueError` for no JSON."""
        if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]: callers are untyped
            raise InvalidType(f"the value of {key!r} must be JSON text, not {type(value).__name__}")
        _json(key, value)
        self._engine_specific[key] = value

    def get_engine_specific(self, key: str) -> Any | None:
        """The value at `key`, decoded; None if there is none."""
        text = self._engine_specific.get(key)
        return None if text is None else _json(key, text)

    @property
    def bootstrap_host(self) -> str | None:
        """Where decode workers meet this one."""
        return None if self._disaggregated is None else self._disaggregated.bootstrap_host

    @property
    def bootstrap_port(self) -> int | None:
        """The port there."""
        return None if self._disaggregated is None else self._disaggregated.bootstrap_port

    def set_disaggregated_endpoint(self, bootstrap_host: str | None = None, bootstrap_port: int | None = None) -> None:
        """Say where decode workers meet this one."""
        self._disaggregated = DisaggregatedEndpoint(bootstrap_host=bootstrap_host, bootstrap_port=bootstrap_port)

    def set_structural_tag_mode(self, mode: str) -> None:
        """`off` or `on`. Raises `ValueError` for anything else."""
        self._tag("mode", mode, ("off", "on"))

    def set_structural_tag_scope(self, scope: str) -> None:
        """`auto` or `always`. Raises `ValueError` for anything else."""
        self._tag("scope", scope, ("auto", "always"))

    def set_structural_tag_schema(self, schema: str) -> None:
        """`auto` or `strict`. Raises `ValueError` for anything else."""
        self._tag("schema", schema, ("auto", "strict"))

    def _tag(self, what: str, value: str, choices: tuple[str, str]) -> None:
        if value not in choices:
            raise InvalidValue(f"Invalid structural_tag_{what}: {value}. Expected '{choices[0]}' or '{choices[1]}'.")
        self._tags[what] = value

    def for_card(self) -> RuntimeConfig:
        """As a model card has it. Raises `TypeError` naming the attribute that does not fit, `ValueError` for one out of range."""
        if self.kv_transfer_enforcement not in (None, "required", "preferred"):
            raise InvalidValue(
                f"kv_transfer_enforcement must be 'required' or 'preferred', got \"{self.kv_transfer_enforcement}\""
            )
        if self.tokenizer_backend not in (None, "default", "fastokens"):
            raise InvalidValue(f"invalid tokenizer backend '{self.tokenizer_backend}' (expected 'default' or 'fastokens')")
        given = {name: getattr(self, name) for name in self.__slots__ if not name.startswith("_")}
        given.update({f"structural_tag_{what}": value for what, value in self._tags.items()})
        given["taints"] = sorted(self.taints) or None
        given["topology_domains"] = self.topology_domains or None
        given["runtime_data"] = {key: _json(key, text) for key, text in self._engine_specific.items()} or None
        given["disaggregated_endpoint"] = self._disaggregated
        try:
            return msgspec.convert(given, RuntimeConfig, from_attributes=True)
        except msgspec.ValidationError as error:
            raise InvalidType(f"runtime_config: {error}") from error


class ModelDeploymentCard:
    """A model card, as discovery has it."""

    __slots__ = ("_card",)

    def __init__(self, card: ModelCard) -> None:
        """Use `from_json_str`."""
        self._card = card

    @staticmethod
    def from_json_str(json: str) -> "ModelDeploymentCard":
        """Raises `ValueError` for what is no JSON object, `PeerProtocolError` for one that is no card."""
        value = _json("model card", json)
        if not isinstance(value, dict):
            raise InvalidValue(f"a model card is a JSON object, not {type(value).__name__}")
        return ModelDeploymentCard(card_from_json(cast("dict[str, Any]", value)))

    def to_json_str(self) -> str:
        """The JSON that discovery has."""
        return msgspec.json.encode(card_to_json(self._card)).decode()

    def model_type(self) -> ModelType:
        """What the model can be asked for. Flags that are not known are left out."""
        return ModelType(*(flag for flag in CardType if flag in self._card.model_types))

    def source_path(self) -> str:
        """Where the model comes from; "" if the card does not say."""
        return self._card.source_path or ""

    def local_dir(self) -> str:
        """The directory of the model's files. Stator does not download: it is the path of the card."""
        return self._card.source_path or ""

    def name(self) -> str:
        """The name clients ask for."""
        return self._card.display_name

    def runtime_config(self) -> dict[str, Any]:
        """What the worker can do at run time, as the card has it."""
        return card_to_json(self._card)["runtime_config"]


def _json(what: str, text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidValue(f"{what}: not JSON: {error}") from error
