"""Whatever the text, the split and the rules: detokenising gives the text back, and nothing behind a stop is shown."""

import tempfile
from functools import cache
from pathlib import Path

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stator.llm.detokenizer import OffsetDetokenizer, open_detokenizer
from stator.llm.output import EngineOutput
from stator.llm.postprocess import Postprocessor
from stator.llm.request import OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions
from stator.llm.stop import StopMatch, StopScanner
from stator.llm.tokenizer import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from stator.testing.tiny_tokenizers import build_byte_level, build_fallback

BYTES = ByteTokenizer()
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)
# Few different characters, so that stop strings begin, fail and overlap.
narrow = st.text(alphabet="abé", max_size=30)
stops = st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=4)


@cache
def hugging_face(kind: str) -> HuggingFaceTokenizer:
    build = {"byte_level": build_byte_level, "fallback": build_fallback}[kind]
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = HuggingFaceTokenizer(build(Path(directory) / "tokenizer.json"))
        assert (tokenizer.pieces is None) == (kind == "fallback")
        return tokenizer


def detokenise(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = open_detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@given(texts)
def test_the_byte_tokenizer_is_the_identity(text: str) -> None:
    ids = BYTES.encode(text)
    assert BYTES.decode(ids) == text
    pieces = detokenise(BYTES, ids)
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)


@given(st.lists(st.integers(min_value=0, max_value=300), max_size=60), st.booleans())
def test_any_bytes_come_out_as_decoded_at_once(ids: list[int], skip: bool) -> None:
    detokenizer = open_detokenizer(BYTES, skip_special=skip)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert text == BYTES.decode(ids, skip_special=skip)


@settings(deadline=None)
@given(st.sampled_from(["byte_level", "fallback"]), texts)
def test_encoded_text_comes_back_and_no_character_is_broken(kind: str, text: str) -> None:
    tokenizer = hugging_face(kind)
    ids = tokenizer.encode(text)
    pieces = detokenise(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assume(not text.startswith(" "))
    assert "".join(pieces) == text


@settings(deadline=None)
@given(st.data())
def test_any_byte_level_tokens_come_out_as_decoded_at_once(data: st.DataObject) -> None:
    tokenizer = hugging_face("byte_level")
    ids = data.draw(st.lists(st.integers(min_value=0, max_value=tokenizer.vocab_size), max_size=40))
    assert "".join(detokenise(tokenizer, ids)) == tokenizer.decode(ids)


@settings(deadline=None)
@given(texts, texts)
def test_the_offset_technique_continues_a_prompt(prompt: str, text: str) -> None:
    tokenizer = hugging_face("byte_level")
    detokenizer = OffsetDetokenizer(tokenizer, context=tokenizer.encode(prompt))
    assert "".join(map(detokenizer.push, tokenizer.encode(text))) + detokenizer.flush() == text


def reference_stop(text: str, strings: list[str]) -> tuple[int, str] | None:
    """The obvious way: the first end of any stop string, then the longest that ends there."""
    ends = [(end, string) for end in range(1, len(text) + 1) for string in strings if text[:end].endswith(string)]
    if not ends:
        return None
    first = min(end for end, _ in ends)
    longest = max((string for end, string in ends if end == first), key=len)
    return first - len(longest), longest


@settings(max_examples=500)
@given(narrow, stops, st.data())
def test_stop_strings_are_found_wherever_the_text_is_split(text: str, strings: list[str], data: st.DataObject) -> None:
    scanner, position, shown = StopScanner(tuple(strings)), 0, ""
    expected = reference_stop(text, strings)
    while position < len(text):
        size = data.draw(st.integers(min_value=1, max_value=5))
        piece, position = text[position : position + size], position + size
        result = scanner.feed(piece)
        if isinstance(result, StopMatch):
            assert expected == (len(shown + result.text), result.string)
            assert shown + result.text == text[: expected[0]]
            return
        shown += result
        assert text.startswith(shown)
        # No more than a possible beginning of a stop string is held back.
        held = text[len(shown) : position]
        assert not held or any(string.startswith(held) for string in strings)
    assert expected is None
    assert shown + scanner.release() == text


@settings(max_examples=300)
@given(narrow, stops, st.booleans(), st.booleans(), st.data())
def test_no_client_sees_text_beyond_a_stop(
    text: str, strings: list[str], include: bool, logprobs: bool, data: st.DataObject
) -> None:
    request = PreprocessedRequest(
        token_ids=[1],
        eos_token_ids=[256],
        stop_conditions=StopConditions(stop=strings),
        sampling_options=SamplingOptions(include_stop_str_in_output=include),
        output_options=OutputOptions(logprobs=0 if logprobs else None),
    )
    choice = Postprocessor(BYTES, request)
    ids, shown, entries, told = BYTES.encode(text), "", list[int](), 0
    last = None
    while ids and not choice.done:
        size = data.draw(st.integers(min_value=1, max_value=4))
        item, ids = ids[:size], ids[size:]
        delta = choice.push(EngineOutput(token_ids=item, log_probs=[-1.0] * len(item)))
        if delta is not None:
            last = delta
            shown += delta.text
            told += delta.tokens
            entries += [byte for part in delta.logprobs or [] for byte in part.bytes]
    if not choice.done:
        last = choice.finish()
        assert last is not None
        shown += last.text
        told += last.tokens
        entries += [byte for part in last.logprobs or [] for byte in part.bytes]
    expected = reference_stop(text, strings)
    assert last is not None
    assert last.finish_reason == "stop"
    if expected is None:
        assert (shown, last.stop_reason) == (text, None)
    else:
        end = expected[0] + len(expected[1]) * include
        assert (shown, last.stop_reason) == (text[:end], expected[1])
    assert told == choice.completion_tokens
    # The tokens with log probabilities are exactly those whose text is shown.
    assert bytes(entries) == (shown.encode() if logprobs else b"")


@given(st.lists(st.integers(min_value=0, max_value=258), max_size=30), st.integers(min_value=0, max_value=10), st.data())
def test_counts_and_limits_hold_for_any_split(ids: list[int], limit: int, data: st.DataObject) -> None:
    request = PreprocessedRequest(
        token_ids=[1], eos_token_ids=[256], stop_conditions=StopConditions(max_tokens=limit, stop_token_ids=[98])
    )
    whole, split = Postprocessor(BYTES, request), Postprocessor(BYTES, request)
    deltas = [[whole.push(EngineOutput(token_ids=ids)), whole.finish()], []]
    rest = ids
    while rest and not split.done:
        size = data.draw(st.integers(min_value=1, max_value=4))
        deltas[1].append(split.push(EngineOutput(token_ids=rest[:size])))
        rest = rest[size:]
    deltas[1].append(split.finish())
    seen = [[delta for delta in each if delta is not None] for each in deltas]
    assert "".join(delta.text for delta in seen[0]) == "".join(delta.text for delta in seen[1])
    assert seen[0][-1].finish_reason == seen[1][-1].finish_reason
    assert seen[0][-1].stop_reason == seen[1][-1].stop_reason
    assert whole.completion_tokens == split.completion_tokens <= limit
    assert sum(delta.tokens for delta in seen[1]) == split.completion_tokens
