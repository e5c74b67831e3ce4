"""Tokenizers: the built-in one is the identity on any text; Hugging Face ones load, agree with themselves and fail by name."""

import json
import sys
from pathlib import Path

import pytest

from stator.errors import UsageError
from stator.llm.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from stator.testing.tiny_tokenizers import END, START, build_byte_level, build_fallback

TEXTS = ["", "hello", "Ça va ? 日本語 🎉👩‍👩‍👧", "a\0b\n", "<|im_end|><|endoftext|>", "\ufffd\u200b\ufeff"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    path = build_byte_level(tmp_path_factory.mktemp("byte_level") / "tokenizer.json")
    return HuggingFaceTokenizer(path, eos_token_ids=[3])


@pytest.fixture(scope="module")
def fallback(tmp_path_factory: pytest.TempPathFactory) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(build_fallback(tmp_path_factory.mktemp("fallback") / "tokenizer.json"))


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_are_the_text(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert bytes(tokenizer.encode(text)) == text.encode()
    assert tokenizer.encode(text, special=True) == tokenizer.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_of_the_byte_tokenizer_are_hidden_and_unreachable() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.vocab_size == 259
    assert tokenizer.eos_token_ids == (256, 258)
    assert tokenizer.decode([104, 257, 105, 256, 99_999]) == "hi"
    assert tokenizer.decode([104, 258], skip_special=False) == "h<|im_end|>"
    assert tokenizer.token_bytes(0xC3) == b"\xc3"
    assert tokenizer.token_bytes(256) == b"<|endoftext|>"
    assert tokenizer.token_bytes(259) is None
    assert tokenizer.token_bytes(-1) is None
    assert tokenizer.decode([0xFF, 104, 0xE2, 0x82]) == "\ufffdh\ufffd"


@pytest.mark.parametrize("name", ["byte", "byte_level", "fallback"])
def test_lone_surrogates_are_refused(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = ByteTokenizer() if name == "byte" else request.getfixturevalue(name)
    with pytest.raises(UsageError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("text", [text for text in TEXTS if "<|" not in text])
def test_a_byte_level_tokenizer_has_a_table_that_agrees_with_it(byte_level: HuggingFaceTokenizer, text: str) -> None:
    ids = byte_level.encode(text)
    pieces = byte_level.pieces
    assert pieces is not None
    assert b"".join(pieces.raw[token] for token in ids) == text.encode()
    assert byte_level.decode(ids) == text


def test_special_and_added_tokens_of_a_byte_level_tokenizer(byte_level: HuggingFaceTokenizer) -> None:
    start, end = byte_level.token_id(START), byte_level.token_id(END)
    assert start is not None
    assert end is not None
    assert byte_level.encode(f"{START}hi{END}")[0] == start
    assert byte_level.decode([start, *byte_level.encode("hi"), end]) == "hi"
    pieces = byte_level.pieces
    assert pieces is not None
    assert pieces.special == {start, end}
    think = byte_level.encode("<think>")
    assert len(think) == 1
    assert pieces.texts(skip_special=True)[think[0]] == "<think>"
    assert pieces.texts(skip_special=True)[end] == ""
    assert pieces.texts(skip_special=False)[end] == END
    assert byte_level.token_bytes(end) == END.encode()
    assert byte_level.token_bytes(10**6) is None
    assert byte_level.vocab_size == max(start, end, think[0]) + 1
    assert byte_level.eos_token_ids == (3,)


def test_a_sentencepiece_like_tokenizer_has_no_table(fallback: HuggingFaceTokenizer) -> None:
    assert fallback.pieces is None
    for text in TEXTS:
        assert fallback.decode(fallback.encode(text)) == text
    assert fallback.token_bytes(fallback.token_id("<0xE6>") or 0) == b"\xe6"
    word = fallback.encode("the")[0]
    assert fallback.token_bytes(word) == b" the"


def test_a_byte_level_decoder_among_others_gets_no_table(tmp_path: Path) -> None:
    path = build_byte_level(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    content["decoder"] = {
        "type": "Sequence",
        "decoders": [content["decoder"], {"type": "Strip", "content": " ", "start": 1, "stop": 0}],
    }
    path.write_text(json.dumps(content))
    assert HuggingFaceTokenizer(tmp_path).pieces is None


def test_limits_saved_with_the_file_are_lifted(tmp_path: Path) -> None:
    path = build_byte_level(tmp_path / "tokenizer.json")
    content = json.loads(path.read_text())
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content))
    tokenizer = HuggingFaceTokenizer(path)
    assert tokenizer.decode(tokenizer.encode("what all were we when")) == "what all were we when"


def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere.*tokenizer\.json|nowhere"):
        HuggingFaceTokenizer(tmp_path / "nowhere")
    broken = tmp_path / "tokenizer.json"
    broken.write_text('{"model": 5}')
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        HuggingFaceTokenizer(tmp_path)


def test_without_the_extra_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build_byte_level(tmp_path / "tokenizer.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UsageError, match=r"pip install 'stator\[models\]'"):
        HuggingFaceTokenizer(path)
