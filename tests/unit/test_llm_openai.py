"""OpenAI bodies: what is taken, and how what is not is named."""

from typing import Any

import msgspec
import pytest

from stator.llm.openai import InvalidRequest, parse_chat, parse_completion

HELLO = [{"role": "user", "content": "hello"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def chat(**fields: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "messages": HELLO, **fields})


def completion(**fields: Any) -> bytes:
    return msgspec.json.encode({"model": "m", "prompt": "hello", **fields})


def refused(body: bytes, *, parse: Any = parse_chat) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(body)
    assert caught.value.status == 400
    return caught.value


def test_everything_at_once_is_taken() -> None:
    request = parse_chat(
        chat(
            stream=True,
            stream_options={"include_usage": True, "include_obfuscation": False},
            n=2,
            max_tokens=5,
            max_completion_tokens=6,
            temperature=0,
            top_p=0.5,
            presence_penalty=-2,
            frequency_penalty=2,
            seed=-1,
            stop=["a", "b"],
            user="u",
            metadata={"a": "b"},
            logprobs=True,
            top_logprobs=3,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}},
            tools=[TOOL],
            tool_choice="auto",
            parallel_tool_calls=True,
            modalities=["text"],
            store=False,
            service_tier="auto",
            reasoning_effort="low",
            ignore_eos=True,
            min_tokens=1,
            top_k=-1,
            min_p=0.1,
            repetition_penalty=1.1,
            stop_token_ids=[1],
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            prompt_logprobs=1,
            return_tokens_as_token_ids=True,
            guided_json={},
            guided_regex="a",
            guided_choice=["a"],
            guided_grammar="g",
            guided_decoding_backend="x",
            guided_whitespace_pattern=" ",
            chat_template_args={"a": 1},
            chat_template_kwargs={"a": 2, "b": 3},
            thinking={"type": "enabled"},
            media_io_kwargs={},
            mm_processor_kwargs={},
            logit_bias={},
            functions=[],
            audio=None,
            nvext={"annotations": ["x"], "agent_hints": {"priority": 1}},
        )
    )
    assert request.max_completion_tokens == 6
    assert request.template_args == {"a": 2, "b": 3}
    assert request.stop_strings == ["a", "b"]
    assert request.stop_ids == [1]
    guided = request.guided_decoding()
    assert guided is not None
    assert guided.regex == "a"


def test_messages_of_every_role() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_chat(
        chat(
            messages=[
                {"role": "system", "content": parts},
                {"role": "developer", "content": ""},
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
                {"role": "assistant", "tool_calls": [{"id": "1"}]},
                {"role": "tool", "content": "x", "tool_call_id": "1", "new_field": 1},
            ]
        )
    )
    assert [message.text() for message in request.messages] == ["a\nb", "", "no", None, "x"]


@pytest.mark.parametrize(
    ("body", "text", "param", "code"),
    [
        (b"", "parse the JSON body", None, None),
        (b"{", "parse the JSON body", None, None),
        (b"[]", "must be a JSON object", None, None),
        (b"\xff", "parse the JSON body", None, None),
        (b'{"model":' + b"[" * 200_000, "nested too deeply", None, None),
        (b'{"thinking":' + b'{"a":' * 200_000 + b"1" + b"}" * 200_001, "nested too deeply", None, None),
        (b'{"model":"m","messages":[{"role":"user","content":"\\ud800"}]}', "parse the JSON body", None, None),
        (b'{"model":"m"}', "Missing required parameter: 'messages'", "messages", "missing_required_parameter"),
        (chat(foo=1, bar=2), "Unknown parameters: 'foo', 'bar'", "foo", "unknown_parameter"),
        (chat(foo=1), "Unknown parameter: 'foo'.", "foo", "unknown_parameter"),
        (chat(model=""), "'model': empty string", "model", None),
        (chat(model=5), "'model': expected `str`, got `int`", "model", "invalid_type"),
        (chat(n=1.5), "'n': expected `int", "n", "invalid_type"),
        (chat(n=True), "'n': expected `int", "n", "invalid_type"),
        (chat(n=0), "Expected a value >= 1, but got 0", "n", "integer_below_min_value"),
        (chat(n=129), "Expected a value <= 128, but got 129", "n", "integer_above_max_value"),
        (chat(max_tokens=0), "'max_tokens': integer below", "max_tokens", "integer_below_min_value"),
        (chat(max_completion_tokens=0), "below", "max_completion_tokens", "integer_below_min_value"),
        (chat(temperature=2.5), "Expected a value <= 2, but got 2.5", "temperature", "decimal_above_max_value"),
        (chat(top_p=-0.5), "Expected a value >= 0", "top_p", "decimal_below_min_value"),
        (chat(seed=2**63), "'seed'", "seed", "integer_above_max_value"),
        (chat(top_k=0), "-1 or a value >= 1", "top_k", None),
        (chat(repetition_penalty=0), "> 0", "repetition_penalty", None),
        (chat(top_logprobs=2), "when 'logprobs' is true", "top_logprobs", None),
        (chat(logprobs=True, top_logprobs=21), "<= 20", "top_logprobs", "integer_above_max_value"),
        (chat(stream_options={}), "only allowed when 'stream' is set to true", "stream_options", None),
        (chat(stop=list("abcde")), "maximum length 4", "stop", "array_above_max_length"),
        (chat(stop_token_ids=[1] * 5), "maximum length 4", "stop_token_ids", "array_above_max_length"),
        (chat(stop_token_ids=[-1]), "token ids are integers", "stop_token_ids", None),
        (chat(stop=""), "1 to 1024 characters", "stop", None),
        (chat(stop=["a" * 1025]), "1 to 1024 characters", "stop", None),
        (chat(stop=["a", 1]), "cannot be mixed", "stop", None),
        (chat(messages=[]), "empty array", "messages", "empty_array"),
        (chat(messages=HELLO * 16_385), "maximum length 16384", "messages", "array_above_max_length"),
        (chat(messages=["x"]), r"\[0\]", "messages", "invalid_type"),
        (chat(messages=[{"role": "king", "content": ""}]), "king", "messages", "invalid_type"),
        (chat(messages=[{"role": "user"}]), "got null", "messages[0].content", "invalid_type"),
        (
            chat(messages=[*HELLO, {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "takes text only, got a part of type 'image_url'",
            "messages[1].content[0].type",
            "invalid_value",
        ),
        (
            chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "Missing",
            "messages[0].content[0].text",
            "missing_required_parameter",
        ),
        (chat(functions=[{}]), "use 'tools' instead", "functions", "unsupported_parameter"),
        (chat(logit_bias={"5": 1}), "token biases", "logit_bias", "unsupported_parameter"),
        (chat(modalities=["text", "audio"]), "text", "modalities", None),
        (chat(tool_choice="auto"), "when 'tools' are specified", "tool_choice", None),
        (
            chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
            "no tool named 'g'",
            "tool_choice",
            None,
        ),
        (chat(tools=[TOOL] * 513), "maximum length 512", "tools", "array_above_max_length"),
        (chat(response_format={"type": "json_schema"}), "response_format.json_schema.schema", "response_format", None),
        (chat(nvext={"ignore_eos": True}), "ignore_eos", "nvext", "invalid_type"),
    ],
)
def test_bad_chat_requests_are_named(body: bytes, text: str, param: str | None, code: str | None) -> None:
    error = refused(body)
    assert (error.param, error.openai_code) == (param, code or error.openai_code)
    with pytest.raises(InvalidRequest, match=text):
        raise error


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts_of_every_kind(prompt: Any, prompts: list[Any]) -> None:
    assert parse_completion(completion(prompt=prompt)).prompts() == prompts


@pytest.mark.parametrize(
    ("fields", "text", "param"),
    [
        ({"prompt": ""}, "must not be empty", "prompt"),
        ({"prompt": []}, "must not be empty", "prompt"),
        ({"prompt": ["a", ""]}, "may be empty", "prompt"),
        ({"prompt": [[]]}, "may be empty", "prompt"),
        ({"prompt": ["a", 1]}, "expected a string, an array", "prompt"),
        ({"prompt": [1, [2]]}, "expected a string, an array", "prompt"),
        ({"prompt": [-1]}, "token ids", "prompt"),
        ({"prompt": [[2**32]]}, "token ids", "prompt"),
        ({"prompt": ["a"] * 2049}, "maximum length 2048", "prompt"),
        ({"prompt": {"a": 1}}, "expected", "prompt"),
        ({"best_of": 2, "n": 3}, "got best_of=2 and n=3", "best_of"),
        ({"logprobs": 6}, "<= 5", "logprobs"),
        ({"echo": True}, "never repeated", "echo"),
        ({"suffix": "x"}, "at its end", "suffix"),
        ({"messages": []}, "Unknown parameter: 'messages'", "messages"),
    ],
)
def test_bad_completion_requests_are_named(fields: dict[str, Any], text: str, param: str) -> None:
    error = refused(completion(**fields), parse=parse_completion)
    assert text in error.message
    assert error.param == param


def test_neutral_values_of_refused_parameters_are_taken() -> None:
    request = parse_completion(completion(echo=False, suffix="", logit_bias=None, best_of=3, n=3, logprobs=5))
    assert (request.best_of, request.logprobs) == (3, 5)


def test_numbers_in_stop_are_token_ids() -> None:
    request = parse_completion(completion(stop=[576, 5], stop_token_ids=[7]))
    assert (request.stop_strings, request.stop_ids) == ([], [7, 576, 5])
