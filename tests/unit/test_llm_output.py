"""A worker's items: tolerant in, compact out."""

from typing import Any

import msgspec
import pytest

from stator.errors import EngineError
from stator.llm.output import (
    CompletionUsage,
    EngineOutput,
    FinishError,
    TopLogprob,
    decode_output,
    decode_outputs,
    encode_output,
    read_output,
    read_outputs,
)

# The eight keys that workers with their own detokenizer send (spec/50 §12).
VERBOSE = (
    b'{"token_ids":[1310],"tokens":[" dume"],"text":" dume","cum_log_probs":null,"log_probs":null,"top_logprobs":null,'
    b'"finish_reason":null,"index":null}'
)


def test_only_set_fields_are_written() -> None:
    assert encode_output(EngineOutput(token_ids=[7])) == b'{"token_ids":[7]}'
    failed = EngineOutput(token_ids=[], finish_reason=FinishError("boom"))
    assert encode_output(failed) == b'{"token_ids":[],"finish_reason":{"error":"boom"}}'


def test_items_of_the_reference_are_read() -> None:
    assert decode_output(VERBOSE) == EngineOutput(token_ids=[1310], tokens=[" dume"], text=" dume")
    assert decode_output(b'{"token_ids":[426],"finish_reason":"length","new":{}}').finish_reason == "length"
    assert decode_outputs(b'[{"token_ids":[1]},{"token_ids":[2]}]')[1].token_ids == [2]
    full = {
        "token_ids": [3],
        "top_logprobs": [[{"rank": 1, "token_id": 3, "token": None, "logprob": -0.5, "bytes": [97]}]],
        "log_probs": [None],
        "completion_usage": {"prompt_tokens": 4, "prompt_tokens_details": {"audio_tokens": None, "cached_tokens": 2}},
    }
    assert read_output(full) == EngineOutput(
        token_ids=[3],
        top_logprobs=[[TopLogprob(rank=1, token_id=3, logprob=-0.5, bytes=[97])]],
        log_probs=[None],
        completion_usage=CompletionUsage(prompt_tokens=4, prompt_tokens_details={"audio_tokens": None, "cached_tokens": 2}),
    )
    assert read_outputs([full, full]) == [read_output(full)] * 2


@pytest.mark.parametrize(
    "item", [{}, {"token_ids": None}, {"token_ids": ["a"]}, {"token_ids": [-1]}, {"token_ids": [2**32]}, 5, None]
)
def test_other_shapes_are_engine_errors(item: Any) -> None:
    with pytest.raises(EngineError, match="no engine output"):
        read_output(item)
    with pytest.raises(EngineError):
        read_outputs([item])
    with pytest.raises(EngineError):
        decode_output(msgspec.json.encode(item))
    with pytest.raises(EngineError):
        decode_outputs(b"[" + msgspec.json.encode(item))


def test_a_round_trip_keeps_everything() -> None:
    item = EngineOutput(token_ids=[1, 2], text="x", stop_reason=5, index=1, engine_data={"a": [1]}, log_probs=[-1.5, -2.0])
    assert decode_output(encode_output(item)) == item
