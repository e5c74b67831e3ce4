"""Incremental detokenisation: when text appears, and that the pieces joined are what decoding at once gives."""

from pathlib import Path

import pytest

from stator.llm.detokenizer import OffsetDetokenizer, PieceDetokenizer, open_detokenizer
from stator.llm.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from stator.testing.tiny_tokenizers import END, build_byte_level, build_fallback

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(build_byte_level(tmp_path_factory.mktemp("byte_level") / "tokenizer.json"))


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(build_fallback(tmp_path_factory.mktemp("fallback") / "tokenizer.json"))


def test_a_character_appears_when_its_last_byte_does() -> None:
    detokenizer = open_detokenizer(BYTES)
    assert isinstance(detokenizer, PieceDetokenizer)
    assert [detokenizer.push(token) for token in "aé🎉b".encode()] == ["a", "", "é", "", "", "", "🎉", "b"]
    assert detokenizer.flush() == ""


def test_wrong_bytes_become_replacement_characters_as_soon_as_that_is_certain() -> None:
    detokenizer = open_detokenizer(BYTES)
    assert [detokenizer.push(token) for token in b"\xe2\x82a\xff\xf0"] == ["", "", "\ufffda", "\ufffd", ""]
    assert detokenizer.flush() == "\ufffd"
    assert detokenizer.flush() == ""


def test_hidden_tokens_show_nothing_and_break_no_character() -> None:
    detokenizer = open_detokenizer(BYTES)
    assert [detokenizer.push(token) for token in (0xC3, 257, 0xA9, 256)] == ["", "", "é", ""]
    shown = open_detokenizer(BYTES, skip_special=False)
    assert [shown.push(token) for token in (0xC3, 257)] == ["", "\ufffd<|im_start|>"]


def test_ids_outside_the_vocabulary_are_nothing() -> None:
    detokenizer = open_detokenizer(BYTES)
    assert [detokenizer.push(token) for token in (104, 5000, 105)] == ["h", "", "i"]


def test_byte_level_tokens_with_halves_of_characters(byte_level: HuggingFaceTokenizer) -> None:
    text = "héllo wörld 🚀 שלום"
    ids = byte_level.encode(text)
    detokenizer = open_detokenizer(byte_level)
    assert isinstance(detokenizer, PieceDetokenizer)
    shown = [detokenizer.push(token) for token in ids]
    assert "".join(shown) + detokenizer.flush() == text == byte_level.decode(ids)
    assert not any("\ufffd" in piece for piece in shown)
    assert len(ids) > len(text.split())


def test_the_first_space_is_dropped_at_the_start_and_kept_behind_a_prompt(fallback: HuggingFaceTokenizer) -> None:
    words = fallback.encode("hello world")
    alone = open_detokenizer(fallback)
    assert isinstance(alone, OffsetDetokenizer)
    assert "".join(alone.push(token) for token in words) + alone.flush() == "hello world"
    behind = open_detokenizer(fallback, context=fallback.encode("say"))
    assert "".join(behind.push(token) for token in words) + behind.flush() == " hello world"


def test_fallback_bytes_wait_for_the_whole_character(fallback: HuggingFaceTokenizer) -> None:
    ids = fallback.encode("a🎉b")
    detokenizer = open_detokenizer(fallback)
    shown = [detokenizer.push(token) for token in ids]
    assert "".join(shown) + detokenizer.flush() == "a🎉b"
    assert not any("\ufffd" in piece for piece in shown)
    # An answer that ends within the character.
    cut = open_detokenizer(fallback)
    position = ids.index(fallback.token_id("<0xF0>") or 0)
    start = "".join(cut.push(token) for token in ids[: position + 2])
    assert start == "a"
    assert start + cut.flush() == fallback.decode(ids[: position + 2]) == "a\ufffd\ufffd"


def test_endless_wrong_bytes_are_shown_in_time_and_cost_no_more_each(fallback: HuggingFaceTokenizer) -> None:
    wrong = fallback.token_id("<0xFF>") or 0
    detokenizer = OffsetDetokenizer(fallback)
    shown = [detokenizer.push(wrong) for _ in range(200)]
    assert "".join(shown) + detokenizer.flush() == "\ufffd" * 200
    assert len("".join(shown)) >= 190
    assert max(len(piece) for piece in shown) <= 10


def test_the_offset_technique_agrees_with_the_table(byte_level: HuggingFaceTokenizer) -> None:
    ids = [*byte_level.encode("Ça va 🙂?"), byte_level.token_id(END) or 0, *byte_level.encode(" bien")]
    for skip in (True, False):
        offset, table = OffsetDetokenizer(byte_level, skip_special=skip), open_detokenizer(byte_level, skip_special=skip)
        texts = ["".join(each.push(token) for token in ids) + each.flush() for each in (offset, table)]
        assert texts[0] == texts[1] == byte_level.decode(ids, skip_special=skip)


def test_a_directory_is_as_good_as_its_file(tmp_path: Path) -> None:
    build_byte_level(tmp_path / "tokenizer.json")
    tokenizer = HuggingFaceTokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
