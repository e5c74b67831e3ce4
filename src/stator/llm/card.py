"""The model deployment card (`spec/20 §9`): what a worker publishes about the model it serves.

Cards are read and written as the reference does it: its key order, absent keys where it omits them, unknown keys ignored.
`mdcsum` is not stored; every reader computes it, and workers of one model with different sums are never mixed.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, cast

import msgspec
from blake3 import blake3

from stator.errors import PeerProtocolError, UsageError
from stator.protocol.ids import slug

__all__ = [
    "ChatTemplateFile",
    "DisaggregatedEndpoint",
    "File",
    "GenerationConfigFile",
    "ModelCard",
    "ModelInfoFile",
    "ModelType",
    "PromptFormatterFile",
    "RuntimeConfig",
    "TokenizerFile",
    "WorkerType",
    "byte_card",
    "card_from_directory",
    "card_from_json",
    "card_to_json",
    "is_byte_card",
    "mdcsum",
]


class ModelType(StrEnum):
    """What a model can be asked for; a card joins several with " | " in this order."""

    CHAT = "Chat"
    COMPLETIONS = "Completions"
    EMBEDDING = "Embedding"
    TENSOR_BASED = "TensorBased"
    PREFILL = "Prefill"
    IMAGES = "Images"
    AUDIOS = "Audios"
    VIDEOS = "Videos"
    REALTIME = "Realtime"


class WorkerType(StrEnum):
    """The part a worker plays; aggregated workers do everything."""

    PREFILL = "prefill"
    DECODE = "decode"
    ENCODE = "encode"
    AGGREGATED = "aggregated"


_WORKER_CODES = {None: 0, WorkerType.PREFILL: 1, WorkerType.DECODE: 2, WorkerType.ENCODE: 3, WorkerType.AGGREGATED: 4}


class File(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A file of the model: `path` is local or a URL, `checksum` is `blake3:` and 64 hex digits, `size` is in bytes."""

    path: str
    checksum: str
    size: int | None = None


class ModelInfoFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`config.json`."""

    hf_config_json: File | None = None


class TokenizerFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`tokenizer.json`, or a tiktoken model (which Stator does not read)."""

    hf_tokenizer_json: File | None = None
    tik_token_model: File | None = None


class ChatTemplateFile(msgspec.Struct, frozen=True, kw_only=True):
    """A chat template in a file of its own; custom ones were given by the operator."""

    is_custom: bool = False
    file: File


class PromptFormatterFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a chat template is: exactly one of the fields is set."""

    hf_tokenizer_config_json: File | None = None
    hf_chat_template: ChatTemplateFile | None = None
    hf_chat_template_jinja: ChatTemplateFile | None = None
    hf_chat_template_json: ChatTemplateFile | None = None


class GenerationConfigFile(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`generation_config.json`."""

    hf_generation_config_json: File | None = None


class DisaggregatedEndpoint(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Where a prefill worker meets decode workers."""

    bootstrap_host: str | None = None
    bootstrap_port: int | None = None


class RuntimeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker can do at run time; not part of `mdcsum`, but for `context_length`. Lengths are in tokens."""

    context_length: int | None = None
    """effective limit; wins over the card's architectural one"""
    total_kv_blocks: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    tool_call_parser: str | None = None
    reasoning_parser: str | None = None
    tokenizer_backend: str | None = None
    structural_tag_mode: str = "off"
    structural_tag_scope: str = "auto"
    structural_tag_schema: str = "auto"
    exclude_tools_when_tool_choice_none: bool = True
    data_parallel_start_rank: int = 0
    data_parallel_size: int = 1
    enable_local_indexer: bool = True
    runtime_data: dict[str, Any] | None = None
    disaggregated_endpoint: DisaggregatedEndpoint | None = None
    enable_eagle: bool = False
    taints: list[str] | None = None
    stable_routing_id: str | None = None
    topology_domains: dict[str, str] | None = None
    kv_transfer_domain: str | None = None
    kv_transfer_enforcement: str | None = None
    kv_transfer_preferred_weight: float | None = None
    max_gpu_lora_count: int | None = None


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """One model as one worker serves it."""

    display_name: str
    """the name clients ask for"""
    slug: str = ""
    """derived from `display_name` when empty"""
    source_path: str | None = None
    model_info: ModelInfoFile | None = None
    tokenizer: TokenizerFile | None = None
    prompt_formatter: PromptFormatterFile | None = None
    chat_template_file: PromptFormatterFile | None = None
    gen_config: GenerationConfigFile | None = None
    prompt_context: list[str] | None = None
    architectural_max_context_length: int | None = None
    kv_cache_block_size: int = 16
    migration_limit: int = 0
    model_type: str = f"{ModelType.CHAT} | {ModelType.COMPLETIONS}"
    model_input: str = "Tokens"
    """`Tokens`, `Text` or `Tensor`: what the worker takes"""
    worker_type: WorkerType | None = WorkerType.AGGREGATED
    needs: list[list[WorkerType]] = []
    """alternatives; each lists the worker types that must also be there"""
    lora: dict[str, Any] | None = None
    user_data: Any = None
    runtime_config: RuntimeConfig = RuntimeConfig()
    tensor_model_config: dict[str, Any] | None = None
    media_decoder: dict[str, Any] | None = None
    media_fetcher: dict[str, Any] | None = None
    router_config: dict[str, Any] | None = None
    extra_files: list[File] | None = None

    @property
    def context_length(self) -> int:
        """The effective limit of prompt and answer together, in tokens; 0 when unknown."""
        return self.runtime_config.context_length or self.architectural_max_context_length or 0

    @property
    def model_types(self) -> frozenset[str]:
        """The flags of `model_type`."""
        return frozenset(flag.strip() for flag in self.model_type.split("|") if flag.strip())


_ALWAYS_WRITTEN = {"model_info", "tokenizer", "worker_type", "media_decoder", "media_fetcher"}
_ALWAYS_WRITTEN_RUNTIME = {
    "total_kv_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
    "tool_call_parser",
    "reasoning_parser",
}


def card_to_json(card: ModelCard) -> dict[str, Any]:
    """The card as `ModelRecord.card_json`; keys in the reference's order, null or absent as it has them."""
    value: dict[str, Any] = msgspec.to_builtins(card)
    value["slug"] = card.slug or slug(card.display_name)
    value["runtime_config"] = _without_unset(value["runtime_config"], _ALWAYS_WRITTEN_RUNTIME)
    return _without_unset(value, _ALWAYS_WRITTEN)


def card_from_json(value: dict[str, Any]) -> ModelCard:
    """Read a card; `PeerProtocolError` names the field that does not fit. Unknown fields are ignored."""
    try:
        return msgspec.convert(value, ModelCard)
    except msgspec.ValidationError as error:
        raise PeerProtocolError(f"model card cannot be read: {error}") from error


def _without_unset(value: dict[str, Any], keep: set[str]) -> dict[str, Any]:
    return {
        key: item
        for key, item in value.items()
        if key in keep or (item is not None and item != [] and item != {}) or key == "needs"
    }


def mdcsum(card: ModelCard) -> str:
    """The card's checksum: 64 hex digits (`spec/20 §9.5`), sent along with requests as `mdc_sum`."""
    digest = blake3(card.display_name.encode())
    if card.source_path is not None:
        digest.update(card.source_path.encode())
    for checksum in _checksums(card):
        digest.update(checksum.encode())
    for name, content in sorted((_base_name(file), file.checksum.removeprefix("blake3:")) for file in card.extra_files or []):
        digest.update(name.encode() + b"\0" + content.encode())
    if card.prompt_context is not None:
        # The reference hashes its debug form: oai_chat is OaiChat there.
        names = ("".join(word.capitalize() for word in each.split("_")) for each in card.prompt_context)
        digest.update(f"[{', '.join(names)}]".encode())
    digest.update(
        _u32(card.context_length) + _u32(card.kv_cache_block_size) + _worker_code(card.worker_type) + _u32(len(card.needs))
    )
    for alternative in card.needs:
        digest.update(_u32(len(alternative)) + b"".join(map(_worker_code, alternative)))
    if card.router_config is not None:
        digest.update(blake3(msgspec.json.encode(card.router_config)).digest())
    return digest.hexdigest()


def _checksums(card: ModelCard) -> list[str]:
    """Checksums of the files that make up the model, in the order of the sum."""
    parts: list[msgspec.Struct | None] = [
        card.model_info,
        card.tokenizer,
        card.prompt_formatter,
        card.chat_template_file,
        card.gen_config,
    ]
    found: list[str] = []
    for part in parts:
        variants = msgspec.structs.astuple(part) if part is not None else ()
        for variant in variants:
            file = variant.file if isinstance(variant, ChatTemplateFile) else variant
            if isinstance(file, File):
                found.append(file.checksum)
    return found


def _base_name(file: File) -> str:
    return file.path.rsplit("/", 1)[-1]


def _u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def _worker_code(worker_type: WorkerType | None) -> bytes:
    return bytes((_WORKER_CODES[worker_type],))


def card_from_directory(
    path: str | Path,
    *,
    name: str | None = None,
    chat_template: str | Path | None = None,
    kv_cache_block_size: int = 16,
    model_types: Sequence[str] = (ModelType.CHAT, ModelType.COMPLETIONS),
    worker_type: WorkerType = WorkerType.AGGREGATED,
    needs: Sequence[Sequence[WorkerType]] = (),
    runtime_config: RuntimeConfig | None = None,
    user_data: Any = None,
) -> ModelCard:
    """Describe a Hugging Face model directory. Blocks: reads and hashes its small files, not the weights.

    `name` defaults to `path` as given; `chat_template` is a template file that replaces the model's own. Raises `UsageError`
    when there is no `config.json` or no `tokenizer.json`, or when one of the files is broken.
    """
    directory = Path(path).absolute()
    config, tokenizer = _file(directory / "config.json"), _file(directory / "tokenizer.json")
    if config is None or tokenizer is None:
        missing = "config.json" if config is None else "tokenizer.json"
        raise UsageError(f"{directory} is no model directory: it has no {missing}")
    formatter, generation = _file(directory / "tokenizer_config.json"), _file(directory / "generation_config.json")
    return ModelCard(
        display_name=name or str(path),
        source_path=str(path),
        model_info=ModelInfoFile(hf_config_json=config),
        tokenizer=TokenizerFile(hf_tokenizer_json=tokenizer),
        prompt_formatter=PromptFormatterFile(hf_tokenizer_config_json=formatter) if formatter else None,
        chat_template_file=_chat_template_file(directory, chat_template),
        gen_config=GenerationConfigFile(hf_generation_config_json=generation) if generation else None,
        architectural_max_context_length=_max_context_length(directory),
        kv_cache_block_size=kv_cache_block_size,
        model_type=" | ".join(flag for flag in ModelType if flag in model_types),
        worker_type=worker_type,
        needs=[list(alternative) for alternative in needs],
        user_data=user_data,
        runtime_config=runtime_config or RuntimeConfig(),
    )


def _file(path: Path) -> File | None:
    """The card's entry of a file; None if there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"model file {path} cannot be read: {error}") from error
    return File(path=str(path), checksum=f"blake3:{blake3(content).hexdigest()}", size=len(content))


def _chat_template_file(directory: Path, custom: str | Path | None) -> PromptFormatterFile | None:
    if custom is not None:
        file = _file(Path(custom).absolute())
        if file is None:
            raise UsageError(f"there is no chat template at {custom}")
        return PromptFormatterFile(hf_chat_template=ChatTemplateFile(is_custom=True, file=file))
    jinja = _file(directory / "chat_template.jinja")
    if jinja is not None:
        return PromptFormatterFile(hf_chat_template=ChatTemplateFile(file=jinja))
    wrapped = _file(directory / "chat_template.json")
    return PromptFormatterFile(hf_chat_template_json=ChatTemplateFile(file=wrapped)) if wrapped else None


def _max_context_length(directory: Path) -> int | None:
    """`max_position_embeddings`, at the top or in `text_config`, else the tokenizer's `model_max_length`; None if unknown."""
    config = _settings(directory / "config.json")
    text = config.get("text_config")
    nested = cast(dict[str, Any], text) if isinstance(text, dict) else {}
    tokenizer = _settings(directory / "tokenizer_config.json")
    candidates = (
        config.get("max_position_embeddings"),
        nested.get("max_position_embeddings"),
        tokenizer.get("model_max_length"),
    )
    # Tokenizers without a limit state one of 1e30.
    return next((length for length in candidates if isinstance(length, int) and 0 < length < 2**32), None)


def _settings(path: Path) -> dict[str, Any]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"model file {path} is not a JSON object: {error}") from error


_BYTE_MODEL = Path(__file__).parent / "byte_model"


def byte_card(
    name: str, *, context_length: int = 2**20, kv_cache_block_size: int = 16, runtime_config: RuntimeConfig | None = None
) -> ModelCard:
    """The card of a model that speaks the built-in byte tokenizer (`stator.llm.tokenizer.ByteTokenizer`).

    Its files, shipped with the package, describe the same tokenizer and template to a frontend of the reference on the same
    host; `user_data` tells a Stator frontend that it needs none of them. `source_path` is no path, so that the checksum does
    not depend on where a worker is installed. `context_length` is in tokens, which are bytes. Blocks: reads four small files.
    """
    card = card_from_directory(_BYTE_MODEL, name=name, kv_cache_block_size=kv_cache_block_size)
    return msgspec.structs.replace(
        card,
        source_path="stator/byte-tokenizer",
        architectural_max_context_length=None,
        user_data={"stator": {"tokenizer": "byte"}},
        runtime_config=msgspec.structs.replace(runtime_config or RuntimeConfig(), context_length=context_length),
    )


def is_byte_card(card: ModelCard) -> bool:
    """Whether the model speaks the byte tokenizer. Judged by `user_data` alone."""
    given: object = card.user_data
    hint: object = cast(dict[str, Any], given).get("stator") if isinstance(given, dict) else None
    return isinstance(hint, dict) and cast(dict[str, Any], hint).get("tokenizer") == "byte"
