"""Chunks and whole answers, byte by byte where clients look."""

from typing import Any

import msgspec
import pytest

from stator.frontend.chunks import CHAT_SHAPE, TEXT_SHAPE, ChunkWriter, FinishedChoice, Shape, Usage
from stator.llm.postprocess import TextDelta, TokenLogprob

USAGE = Usage(prompt_tokens=2, completion_tokens=3, total_tokens=5)


def writer(shape: Shape = CHAT_SHAPE, *, choices: int = 1, include_usage: bool = False) -> ChunkWriter:
    return ChunkWriter(shape, id="1", created=7, model='m"\u2028', choices=choices, include_usage=include_usage)


def events(writer: ChunkWriter, *deltas: TextDelta, index: int = 0, usage: Usage | None = None) -> list[dict[str, Any]]:
    out: list[bytes] = []
    writer.write(out, index, deltas, usage)
    *lines, end = b"".join(out).split(b"\n\n")
    assert end == b""
    assert all(line.startswith(b"data: {") and b"\n" not in line for line in lines)
    return [msgspec.json.decode(line.removeprefix(b"data: ")) for line in lines]


TRICKY = ['"', "\\", "\n\r\t\0", "\u2028\u2029", "é👩‍👩‍👧", "</script>", "data: x\n\n"]


@pytest.mark.parametrize("shape", [CHAT_SHAPE, TEXT_SHAPE], ids=["chat", "text"])
def test_text_survives(shape: Shape) -> None:
    found = events(writer(shape), *[TextDelta(text, 1) for text in TRICKY])
    choices = [event["choices"][0] for event in found]
    assert [choice["delta"]["content"] if shape is CHAT_SHAPE else choice["text"] for choice in choices] == TRICKY
    assert {(event["id"], event["model"], event["created"]) for event in found} == {(shape.id_prefix + "1", 'm"\u2028', 7)}


def test_role_comes_once_per_choice() -> None:
    two = writer(choices=2)
    first = events(two, TextDelta("a", 1), TextDelta("b", 1))
    second = events(two, TextDelta("c", 1), index=1)
    deltas = [event["choices"][0]["delta"] for event in [*first, *second]]
    assert deltas == [{"role": "assistant", "content": "a"}, {"content": "b"}, {"role": "assistant", "content": "c"}]
    assert second[0]["choices"][0]["index"] == 1


def test_ends() -> None:
    chat = events(writer(), TextDelta("a", 1), TextDelta("", 0, "stop"))
    assert chat[1]["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}]
    only = events(writer(), TextDelta("", 0, "length"))
    assert only[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    with_text = events(writer(TEXT_SHAPE), TextDelta("a", 1), TextDelta("z", 1, "length"))
    assert with_text[1]["choices"] == [{"index": 0, "text": "z", "logprobs": None, "finish_reason": "length"}]
    without = events(writer(TEXT_SHAPE), TextDelta("a", 1), TextDelta("", 0, "stop"))
    assert without[1]["choices"][0]["text"] == ""


def test_usage_is_null_until_the_end() -> None:
    with_usage = writer(include_usage=True)
    assert [event["usage"] for event in events(with_usage, TextDelta("a", 1), TextDelta("b", 1, "stop"))] == [None, None]
    last = msgspec.json.decode(with_usage.usage_event(USAGE).removeprefix(b"data: "))
    assert (last["choices"], last["usage"]) == ([], {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5})
    assert "usage" not in events(writer(), TextDelta("a", 1))[0]
    assert events(with_usage, TextDelta("a", 1), usage=USAGE)[0]["usage"]["total_tokens"] == 5


def test_logprobs_of_completions_count_characters() -> None:
    def entry(text: str) -> TokenLogprob:
        return TokenLogprob(token=text, token_id=1, logprob=-1.0, bytes=list(text.encode()))

    text = writer(TEXT_SHAPE)
    found = events(
        text, TextDelta("aé", 2, logprobs=[entry("a"), entry("é")]), TextDelta("b", 1, "stop", logprobs=[entry("b")])
    )
    assert [event["choices"][0]["logprobs"]["text_offset"] for event in found] == [[0, 1], [2]]


@pytest.mark.parametrize("shape", [CHAT_SHAPE, TEXT_SHAPE], ids=["chat", "text"])
def test_whole(shape: Shape) -> None:
    finished = [FinishedChoice(index=0, text="hé", finish_reason="stop", logprobs=None)]
    value = msgspec.json.decode(writer(shape).whole(finished, USAGE))
    assert (value["object"], value["usage"]["total_tokens"]) == (shape.whole, 5)
    (choice,) = value["choices"]
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    if shape is CHAT_SHAPE:
        assert choice["message"] == {"role": "assistant", "content": "hé", "refusal": None}
    else:
        assert choice["text"] == "hé"
