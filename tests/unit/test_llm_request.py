"""The request to a worker: the reference's JSON out, anything reasonable in."""

import msgspec
import pytest

from stator.errors import EngineError
from stator.llm.request import (
    GuidedDecoding,
    PreprocessedRequest,
    Routing,
    SamplingOptions,
    StopConditions,
    encode_request,
    read_request,
)

# As captured from the reference (spec/50 §11).
CAPTURED = (
    '{"model":"tiny","token_ids":[613,518,198,87,614,613,528,198],"stop_conditions":{"max_tokens":2,"stop":null,'
    '"stop_token_ids":null,"stop_token_ids_visible":null,"stop_token_ids_hidden":[614,612],"min_tokens":null,'
    '"ignore_eos":null,"max_thinking_tokens":null},"sampling_options":{"n":null,"best_of":null,"presence_penalty":null,'
    '"frequency_penalty":null,"repetition_penalty":null,"temperature":null,"top_p":null,"top_k":null,"min_p":null,'
    '"use_beam_search":null,"length_penalty":null,"seed":null,"include_stop_str_in_output":null,"guided_decoding":null},'
    '"output_options":{"logprobs":null,"prompt_logprobs":null,"skip_special_tokens":null,"formatted_prompt":null,'
    '"return_tokens_as_token_ids":null},"eos_token_ids":[614,612],"mdc_sum":"012eb691","annotations":[],'
    '"router_config_override":null}'
)


def test_a_minimal_request_is_the_captured_bytes() -> None:
    request = PreprocessedRequest(
        model="tiny",
        token_ids=[613, 518, 198, 87, 614, 613, 528, 198],
        stop_conditions=StopConditions(max_tokens=2, stop_token_ids_hidden=[614, 612]),
        eos_token_ids=[614, 612],
        mdc_sum="012eb691",
    )
    assert encode_request(request).decode() == CAPTURED
    assert read_request(msgspec.json.decode(CAPTURED)) == request


def test_optional_fields_appear_only_when_set_and_in_order() -> None:
    request = PreprocessedRequest(
        token_ids=[1],
        sampling_options=SamplingOptions(guided_decoding=GuidedDecoding(regex="a+")),
        routing=Routing(dp_rank=0),
        require_reasoning=True,
        health_check=True,
    )
    written = msgspec.json.decode(encode_request(request))
    assert list(written)[-4:] == ["routing", "router_config_override", "require_reasoning", "_HEALTH_CHECK"]
    assert written["routing"] == {"dp_rank": 0}
    assert written["sampling_options"]["guided_decoding"] == {"regex": "a+"}
    assert read_request(written) == request
    assert msgspec.json.decode(encode_request(PreprocessedRequest(token_ids=[1], routing=Routing())))["routing"] == {}


def test_almost_everything_may_be_absent_unknown_or_null() -> None:
    assert read_request({"token_ids": [5]}) == PreprocessedRequest(token_ids=[5])
    request = read_request({"token_ids": [5], "new": 1, "stop_conditions": {"max_tokens": 3, "x": 2}, "routing": None})
    assert request.stop_conditions.max_tokens == 3
    assert not request.routing


def test_a_request_of_another_shape_is_the_callers_fault() -> None:
    with pytest.raises(EngineError, match=r"token_ids") as caught:
        read_request({"token_ids": "no"})
    assert caught.value.kind == "InvalidArgument"
    with pytest.raises(EngineError):
        read_request(["no"])
