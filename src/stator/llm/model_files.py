"""Opening the files a card points to: tokenizer, chat template, generation settings.

Files are checked against the card before use: a frontend whose copy of a model differs from the worker's would send wrong
token ids, and nobody would notice but by the answers.
"""

from pathlib import Path
from typing import Any, cast
from urllib.parse import unquote, urlsplit

import msgspec
from blake3 import blake3

from stator.clock import Clock
from stator.errors import UsageError
from stator.llm.card import File, ModelCard, PromptFormatterFile, is_byte_card
from stator.llm.template import ChatTemplate, JinjaTemplate, PlainTemplate
from stator.llm.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer

__all__ = ["load_template", "load_tokenizer"]


def load_tokenizer(card: ModelCard) -> Tokenizer:
    """The tokenizer of the model, ready for use. Blocks on files, up to seconds. Raises `UsageError` naming what is missing."""
    if is_byte_card(card):
        return ByteTokenizer()
    file = card.tokenizer and card.tokenizer.hf_tokenizer_json
    if file is None:
        raise UsageError(f"model {card.display_name!r} has no tokenizer.json; other kinds of tokenizers cannot be read")
    tokenizer = HuggingFaceTokenizer(_checked(file), eos_token_ids=_eos_token_ids(card))
    if tokenizer.pieces is not None:
        tokenizer.pieces.texts(skip_special=True)  # built here, off the event loop, and not under the first request
    return tokenizer


def load_template(card: ModelCard, clock: Clock) -> ChatTemplate | None:
    """The chat template of the model; None if it has none. Blocks on files. `UsageError` if it cannot be read."""
    if is_byte_card(card):
        return PlainTemplate()
    settings = _tokenizer_config(card)
    source = _template_source(card.chat_template_file) or _template_source(card.prompt_formatter) or _default_template(settings)
    if source is None:
        return None
    bos_token, eos_token = _token_text(settings.get("bos_token")), _token_text(settings.get("eos_token"))
    return JinjaTemplate(source, clock=clock, bos_token=bos_token, eos_token=eos_token)


def _checked(file: File) -> Path:
    """The local path of a file whose content is the card's. Raises `UsageError` if it is not here or differs."""
    path = _local(file)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(
            f"model file {path} cannot be read ({error}); frontends need the worker's model files at the same path"
        ) from error
    if f"blake3:{blake3(content).hexdigest()}" != file.checksum:
        raise UsageError(f"model file {path} differs from the one the worker has (checksum); bring both to the same version")
    return path


def _local(file: File) -> Path:
    url = urlsplit(file.path)
    if url.scheme == "file":
        return Path(unquote(url.path))
    if url.scheme in ("http", "https", "hf"):
        raise UsageError(
            f"model file {file.path} is remote; only local files can be read: put the model at the same path on both hosts"
        )
    return Path(file.path)


def _read_json(file: File | None) -> dict[str, Any]:
    """A JSON file as a dict; empty if the card has no such file."""
    if file is None:
        return {}
    path = _checked(file)
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UsageError(f"model file {path} is not a JSON object: {error}") from error


def _tokenizer_config(card: ModelCard) -> dict[str, Any]:
    formatter = card.prompt_formatter
    return _read_json(formatter.hf_tokenizer_config_json if formatter else None)


def _template_source(place: PromptFormatterFile | None) -> str | None:
    """The template in a file of its own; None if `place` has no such file."""
    if place is None:
        return None
    wrapped = place.hf_chat_template_json
    if wrapped is not None:
        return _default_template(_read_json(wrapped.file))
    found = place.hf_chat_template or place.hf_chat_template_jinja
    return _checked(found.file).read_text("utf-8") if found is not None else None


def _default_template(settings: dict[str, Any]) -> str | None:
    """`chat_template`: one source, or a list of named ones of which `default` is taken."""
    template = settings.get("chat_template")
    if isinstance(template, list):
        entries = [_object(entry) for entry in cast(list[object], template)]
        template = next((entry.get("template") for entry in entries if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _object(value: object) -> dict[str, Any]:
    """`value` if it is a JSON object, else an empty one."""
    return cast(dict[str, Any], value) if isinstance(value, dict) else {}


def _token_text(value: Any) -> str:
    """A special token in `tokenizer_config.json`: a string, or an object with `content`."""
    text = _object(value).get("content", value)
    return text if isinstance(text, str) else ""


def _eos_token_ids(card: ModelCard) -> list[int]:
    """From `generation_config.json`, else from `config.json`: one id or several."""
    generation = _read_json(card.gen_config.hf_generation_config_json if card.gen_config else None)
    model = _read_json(card.model_info.hf_config_json if card.model_info else None)
    for settings in (generation, model, _object(model.get("text_config"))):
        ids: object = settings.get("eos_token_id")
        if isinstance(ids, int):
            return [ids]
        if isinstance(ids, list) and ids:
            return [token for token in cast(list[object], ids) if isinstance(token, int)]
    return []
