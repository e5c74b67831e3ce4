"""Model cards: the reference's JSON, its checksum, and cards made from directories."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from stator.errors import PeerProtocolError, UsageError
from stator.llm import card as card_module
from stator.llm.card import (
    File,
    ModelCard,
    ModelType,
    RuntimeConfig,
    WorkerType,
    byte_card,
    card_from_directory,
    card_from_json,
    card_to_json,
    is_byte_card,
    mdcsum,
)
from stator.llm.tokenizer import ByteTokenizer
from stator.testing.tiny_tokenizers import build_model_directory

DIGEST = "blake3:" + "0" * 64

# As the reference 1.3.1 writes a card with everything set (spec/20 §9.1).
FULL: dict[str, Any] = json.loads(
    """{
"display_name":"my/Model-Name_1.0","slug":"my_model-name_1_0","source_path":"/models/tiny",
"model_info":{"hf_config_json":{"path":"/models/tiny/config.json","checksum":"blake3:cbf8","size":273}},
"tokenizer":{"hf_tokenizer_json":{"path":"/models/tiny/tokenizer.json","checksum":"blake3:c1a0","size":7473}},
"prompt_formatter":{"hf_tokenizer_config_json":{"path":"/models/tiny/tokenizer_config.json","checksum":"blake3:8c92","size":238}},
"gen_config":{"hf_generation_config_json":{"path":"/models/tiny/generation_config.json","checksum":"blake3:a81c","size":58}},
"architectural_max_context_length":2048,"kv_cache_block_size":16,"migration_limit":0,
"model_type":"Chat | Completions","model_input":"Tokens","worker_type":"aggregated","needs":[],"user_data":{"u":1},
"runtime_config":{"context_length":1500,"total_kv_blocks":1000,"max_num_seqs":64,"max_num_batched_tokens":8192,
"tool_call_parser":"hermes","reasoning_parser":"qwen3","tokenizer_backend":"fastokens","structural_tag_mode":"off",
"structural_tag_scope":"auto","structural_tag_schema":"auto","exclude_tools_when_tool_choice_none":true,
"data_parallel_start_rank":0,"data_parallel_size":2,"enable_local_indexer":true,"runtime_data":{"foo":{"a":1}},
"disaggregated_endpoint":{"bootstrap_host":"10.0.0.9","bootstrap_port":9999},"enable_eagle":true,
"taints":["x","dynamo.topology/rack=r1"],"stable_routing_id":"w0","topology_domains":{"rack":"r1"},
"kv_transfer_domain":"rack","kv_transfer_enforcement":"preferred","kv_transfer_preferred_weight":0.5},
"media_decoder":null,"media_fetcher":null}"""
)
MINIMAL_RUNTIME = (
    '{"total_kv_blocks":null,"max_num_seqs":null,"max_num_batched_tokens":null,"tool_call_parser":null,'
    '"reasoning_parser":null,"structural_tag_mode":"off","structural_tag_scope":"auto","structural_tag_schema":"auto",'
    '"exclude_tools_when_tool_choice_none":true,"data_parallel_start_rank":0,"data_parallel_size":1,'
    '"enable_local_indexer":true,"enable_eagle":false}'
)


def test_a_card_of_the_reference_comes_back_as_it_was() -> None:
    card = card_from_json(FULL)
    assert json.dumps(card_to_json(card)) == json.dumps(FULL)
    assert (card.context_length, card.model_types) == (1500, {"Chat", "Completions"})
    assert card.worker_type is WorkerType.AGGREGATED


def test_unset_fields_are_null_or_absent_as_in_the_reference() -> None:
    written = card_to_json(ModelCard(display_name="A b"))
    assert msgspec.json.encode(written["runtime_config"]).decode() == MINIMAL_RUNTIME
    assert [key for key, value in written.items() if value is None] == [
        "model_info",
        "tokenizer",
        "media_decoder",
        "media_fetcher",
    ]
    assert (written["slug"], written["needs"]) == ("a_b", [])
    assert not written.keys() & {"source_path", "gen_config", "user_data", "lora", "extra_files", "router_config"}


def test_readers_ignore_what_they_do_not_know() -> None:
    assert card_from_json({"display_name": "x", "aliases": [], "runtime_config": {"new": 1}}) == ModelCard(display_name="x")
    with pytest.raises(PeerProtocolError, match="display_name"):
        card_from_json({})
    with pytest.raises(PeerProtocolError, match="worker_type"):
        card_from_json({"display_name": "x", "worker_type": "king"})


# Each with the checksum that a frontend of the reference 1.3.1 computed for it (a directory name in its metadata cache).
RECORDED: list[dict[str, Any]] = json.loads(Path(__file__).with_name("recorded_model_cards.json").read_text("utf-8"))


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded["card"]["slug"])
def test_checksums_are_those_of_the_reference(recorded: dict[str, Any]) -> None:
    card = card_from_json(recorded["card"])
    assert mdcsum(card) == recorded["mdcsum"]
    assert json.dumps(card_to_json(card)) == json.dumps(recorded["card"])


def test_the_context_length_is_the_effective_one() -> None:
    assert ModelCard(display_name="x").context_length == 0
    assert ModelCard(display_name="x", architectural_max_context_length=5).context_length == 5
    narrow = ModelCard(display_name="x", architectural_max_context_length=5, runtime_config=RuntimeConfig(context_length=3))
    assert narrow.context_length == 3


def test_the_checksum_covers_what_makes_workers_incompatible_and_nothing_else() -> None:
    base = ModelCard(display_name="x", source_path="p")
    same = [
        msgspec.structs.replace(base, user_data={"a": 1}, migration_limit=3, model_type="Chat"),
        msgspec.structs.replace(base, runtime_config=RuntimeConfig(max_num_seqs=5, reasoning_parser="qwen3")),
    ]
    different = [
        msgspec.structs.replace(base, display_name="y"),
        msgspec.structs.replace(base, source_path=None),
        msgspec.structs.replace(base, kv_cache_block_size=32),
        msgspec.structs.replace(base, runtime_config=RuntimeConfig(context_length=5)),
        msgspec.structs.replace(base, worker_type=WorkerType.DECODE),
        msgspec.structs.replace(base, worker_type=None),
        msgspec.structs.replace(base, needs=[[WorkerType.DECODE]]),
        msgspec.structs.replace(base, prompt_context=["oai_chat"]),
        msgspec.structs.replace(base, router_config={"a": 1}),
        msgspec.structs.replace(base, extra_files=[File(path="/a/b.txt", checksum=DIGEST)]),
    ]
    assert {mdcsum(card) for card in same} == {mdcsum(base)}
    assert len({mdcsum(base), *map(mdcsum, different)}) == len(different) + 1


def test_extra_files_count_in_order_of_name_wherever_they_are() -> None:
    one, two = File(path="/z/a.txt", checksum=DIGEST), File(path="http://h/b.txt", checksum=DIGEST)
    cards = [ModelCard(display_name="x", extra_files=files) for files in ([one, two], [two, one])]
    assert mdcsum(cards[0]) == mdcsum(cards[1])


def test_a_directory_becomes_a_card(tmp_path: Path) -> None:
    directory = build_model_directory(tmp_path / "My Model", context_length=99)
    card = card_from_directory(directory, name="m", needs=[[WorkerType.PREFILL]], worker_type=WorkerType.DECODE)
    assert (card.display_name, card.source_path, card.architectural_max_context_length) == ("m", str(directory), 99)
    assert card.tokenizer is not None
    file = card.tokenizer.hf_tokenizer_json
    assert file is not None
    assert file.path == str(directory / "tokenizer.json")
    assert file.size == (directory / "tokenizer.json").stat().st_size
    assert file.checksum.startswith("blake3:")
    assert card.chat_template_file is None
    assert card.needs == [["prefill"]]
    assert card_from_json(card_to_json(card)) == msgspec.structs.replace(card, slug="m")
    assert card_from_directory(directory).display_name == str(directory)


def test_chat_templates_in_files_of_their_own(tmp_path: Path) -> None:
    directory = build_model_directory(tmp_path / "m", tokenizer_config=None, generation_config=None)
    (directory / "chat_template.json").write_text('{"chat_template": "x"}')
    wrapped = card_from_directory(directory)
    assert wrapped.chat_template_file is not None
    assert wrapped.chat_template_file.hf_chat_template_json is not None
    assert (wrapped.prompt_formatter, wrapped.gen_config) == (None, None)
    (directory / "chat_template.jinja").write_text("x")
    own = card_from_directory(directory).chat_template_file
    assert own is not None
    assert own.hf_chat_template is not None
    assert not own.hf_chat_template.is_custom
    custom = card_from_directory(directory, chat_template=directory / "chat_template.json").chat_template_file
    assert custom is not None
    assert custom.hf_chat_template is not None
    assert custom.hf_chat_template.is_custom
    with pytest.raises(UsageError, match="no chat template at"):
        card_from_directory(directory, chat_template=tmp_path / "none")


@pytest.mark.parametrize(
    ("config", "tokenizer_config", "length"),
    [
        ({"text_config": {"max_position_embeddings": 7}}, {}, 7),
        ({}, {"model_max_length": 8}, 8),
        ({}, {"model_max_length": 10**30}, None),
        ({"text_config": 5}, None, None),
    ],
)
def test_where_the_context_length_comes_from(tmp_path: Path, config: Any, tokenizer_config: Any, length: int | None) -> None:
    directory = build_model_directory(tmp_path / "m", config=config, tokenizer_config=tokenizer_config)
    assert card_from_directory(directory).architectural_max_context_length == length


def test_what_is_no_model_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no model directory.*config\.json"):
        card_from_directory(tmp_path)
    directory = build_model_directory(tmp_path / "m")
    (directory / "config.json").write_text("[")
    with pytest.raises(UsageError, match=r"config\.json is not a JSON object"):
        card_from_directory(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        card_from_directory(directory)


def test_model_types_are_written_in_the_references_order(tmp_path: Path) -> None:
    directory = build_model_directory(tmp_path / "m")
    card = card_from_directory(directory, model_types=[ModelType.COMPLETIONS, ModelType.CHAT])
    assert card.model_type == "Chat | Completions"
    assert card_from_directory(directory, model_types=[]).model_type == ""


def test_the_byte_card_does_not_depend_on_where_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = byte_card("echo", context_length=500)
    assert is_byte_card(card)
    assert card.context_length == 500
    assert is_byte_card(card_from_json(card_to_json(card)))
    assert not any(is_byte_card(ModelCard(display_name="x", user_data=data)) for data in (None, 5, {"stator": 1}, {}))
    shipped = Path(card_module.__file__).parent / "byte_model"
    for file in shipped.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(card_module, "_BYTE_MODEL", tmp_path)
    assert byte_card("echo", context_length=500).tokenizer != card.tokenizer
    assert mdcsum(byte_card("echo", context_length=500)) == mdcsum(card)


def test_the_shipped_files_describe_the_byte_tokenizer() -> None:
    shipped = Path(card_module.__file__).parent / "byte_model"
    theirs, ours = Tokenizer.from_file(str(shipped / "tokenizer.json")), ByteTokenizer()
    text = "".join(map(chr, range(0x250))) + "日本語 🎉\ufffd  spaces\n\n<|im_end|>"
    assert theirs.encode(text).ids == ours.encode(text)
    assert theirs.decode(ours.encode(text)) == text
    assert theirs.get_vocab_size() == ours.vocab_size
    assert [theirs.id_to_token(256 + place) for place in range(3)] == list(ours.SPECIAL)
    generation = json.loads((shipped / "generation_config.json").read_text())
    assert tuple(generation["eos_token_id"]) == ours.eos_token_ids
