"""From OpenAI requests to what a worker gets, with the byte tokenizer and with a model directory."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import UNSET

from stator.errors import UsageError
from stator.llm.card import File, ModelCard, RuntimeConfig, TokenizerFile, byte_card, card_from_directory
from stator.llm.openai import ChatRequest, CompletionRequest, InvalidRequest, parse_chat, parse_completion
from stator.llm.preprocess import Preprocessor
from stator.llm.request import GuidedDecoding, PreprocessedRequest, Routing
from stator.llm.tokenizer import ByteTokenizer, HuggingFaceTokenizer
from stator.testing.manual_clock import ManualClock
from stator.testing.tiny_tokenizers import END, START, build_model_directory

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "required": ["a"]}}}


def load(card: ModelCard) -> Preprocessor:
    return Preprocessor.from_card(card, clock=ManualClock())


BYTES = load(byte_card("echo", context_length=100))


def chat(content: Any = "hé 🎉", **fields: Any) -> ChatRequest:
    return parse_chat(msgspec.json.encode({"model": "echo", "messages": [{"role": "user", "content": content}], **fields}))


def completion(prompt: Any = "hé", **fields: Any) -> CompletionRequest:
    return parse_completion(msgspec.json.encode({"model": "echo", "prompt": prompt, **fields}))


def complete(request: CompletionRequest) -> PreprocessedRequest:
    return BYTES.completion(request, request.prompts()[0])


@pytest.mark.parametrize("text", ["hello", "Ça 日本 👩‍👩‍👧", "<|im_end|>", "{{ 7 * 7 }}", "\n a \n"])
def test_one_message_is_its_own_prompt_byte_for_byte(text: str) -> None:
    request = BYTES.chat(chat(text))
    assert bytes(request.token_ids) == text.encode()
    assert ByteTokenizer().decode(request.token_ids) == text


def test_what_always_travels() -> None:
    request = BYTES.chat(chat())
    assert (request.model, request.mdc_sum) == ("echo", BYTES.mdc_sum)
    assert request.eos_token_ids == request.stop_conditions.stop_token_ids_hidden == [256, 258]
    assert request.stop_conditions.max_tokens is None
    assert (request.routing, request.extra_args, request.annotations) == (UNSET, UNSET, [])


def test_options_find_their_places() -> None:
    request = BYTES.chat(
        chat(
            n=2,
            max_tokens=5,
            max_completion_tokens=6,
            temperature=0.5,
            top_p=0.25,
            presence_penalty=1,
            frequency_penalty=-1,
            repetition_penalty=1.5,
            top_k=4,
            min_p=0.125,
            seed=7,
            stop="x",
            stop_token_ids=[3],
            min_tokens=1,
            include_stop_str_in_output=True,
            skip_special_tokens=False,
            prompt_logprobs=1,
            return_tokens_as_token_ids=True,
            logprobs=True,
            guided_regex="a+",
            mm_processor_kwargs={"a": 1},
        )
    )
    stop, sampling, output = request.stop_conditions, request.sampling_options, request.output_options
    assert (stop.max_tokens, stop.stop, stop.stop_token_ids, stop.min_tokens) == (6, ["x"], [3], 1)
    assert (sampling.n, sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (2, 0.5, 0.25, 4, 0.125)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (1, -1, 1.5)
    assert (sampling.seed, sampling.include_stop_str_in_output) == (7, True)
    assert sampling.guided_decoding == GuidedDecoding(regex="a+")
    assert (output.logprobs, output.prompt_logprobs, output.skip_special_tokens) == (1, 1, False)
    assert output.return_tokens_as_token_ids is True
    assert request.mm_processor_kwargs == {"a": 1}
    assert BYTES.chat(chat(logprobs=True, top_logprobs=4)).output_options.logprobs == 4
    assert complete(completion(best_of=3, logprobs=2, max_tokens=1)).sampling_options.best_of == 3


def test_ignoring_the_end_of_sequence_keeps_the_stop_strings() -> None:
    request = BYTES.chat(chat(ignore_eos=True, stop=["x"]))
    assert request.eos_token_ids == []
    assert request.stop_conditions.stop_token_ids_hidden is None
    assert (request.stop_conditions.ignore_eos, request.stop_conditions.stop) == (True, ["x"])


@pytest.mark.parametrize(
    ("fields", "schema"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, {"type": "object"}),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": 1}}}}, {"a": 1}),
        ({"guided_json": {"b": 1}, "response_format": {"type": "json_object"}}, {"b": 1}),
        (
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            {"type": "object", "required": ["a"]},
        ),
        (
            {"tools": [TOOL], "tool_choice": "required"},
            {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "anyOf": [
                        {
                            "properties": {
                                "name": {"type": "string", "enum": ["f"]},
                                "parameters": {"type": "object", "required": ["a"]},
                            },
                            "required": ["name", "parameters"],
                        }
                    ],
                },
            },
        ),
        ({"tools": [TOOL], "tool_choice": "auto"}, None),
    ],
)
def test_the_grammar_of_the_answer(fields: dict[str, Any], schema: Any) -> None:
    guided = BYTES.chat(chat(**fields)).sampling_options.guided_decoding
    assert guided == (None if schema is None else GuidedDecoding(json=schema))


def test_nvext() -> None:
    request = BYTES.chat(
        chat(
            temperature=1,
            nvext={
                "greed_sampling": True,
                "annotations": ["formatted_prompt"],
                "backend_instance_id": 2**64 - 1,
                "token_data": [1, 2],
                "max_thinking_tokens": 3,
                "cache_salt": "s",
                "extra_fields": ["worker_id"],
                "agent_hints": {"priority": -2, "osl": 9},
                "request_timestamp_ms": 1.5,
                "router": {"ttft_target": 1},
            },
        )
    )
    assert request.token_ids == [1, 2]
    assert request.sampling_options.temperature is None
    assert request.stop_conditions.max_thinking_tokens == 3
    assert request.annotations == ["formatted_prompt"]
    assert request.routing == Routing(backend_instance_id=2**64 - 1, priority=-2, priority_jump=0.0, expected_output_tokens=9)
    assert request.extra_args == {"nvext": {"token_in": True, "cache_salt": "s", "extra_fields": ["worker_id"]}}
    assert (request.router, request.request_timestamp_ms) == ({"ttft_target": 1}, 1.5)
    assert BYTES.chat(chat(nvext={})).routing == Routing()
    assert complete(completion(nvext={"token_data": [5]})).token_ids == [5]


def test_completions_take_text_and_token_ids() -> None:
    assert complete(completion()).token_ids == list("hé".encode())
    assert complete(completion([1, 258])).token_ids == [1, 258]
    with pytest.raises(InvalidRequest, match=r"token id 259 is not in the vocabulary \(0 to 258\)"):
        complete(completion([1, 259]))
    with pytest.raises(InvalidRequest, match="no tokens"):
        BYTES.chat(chat(nvext={"token_data": []}))


def test_an_empty_prompt_is_the_end_of_the_text_before() -> None:
    assert BYTES.chat(chat("")).token_ids == [256]


def test_too_long_says_how_much_and_what_to_do() -> None:
    assert len(BYTES.chat(chat("a" * 99)).token_ids) == 99
    with pytest.raises(InvalidRequest) as caught:
        BYTES.chat(chat("a" * 100))
    assert caught.value.message == (
        "This model's maximum context length is 100 tokens. However, your messages resulted in 100 tokens. "
        "Please reduce the length of the messages."
    )
    assert (caught.value.param, caught.value.openai_code) == ("messages", "context_length_exceeded")
    with pytest.raises(InvalidRequest, match="your prompt resulted in 200 tokens"):
        complete(completion("a" * 200))
    unlimited = Preprocessor(ModelCard(display_name="x"), BYTES.tokenizer, BYTES.template)
    assert len(unlimited.chat(chat("a" * 500)).token_ids) == 500


def test_a_model_without_template_takes_completions_only() -> None:
    bare = Preprocessor(ModelCard(display_name="x"), BYTES.tokenizer, None)
    assert bare.completion(completion(), "a").token_ids == [97]
    with pytest.raises(InvalidRequest, match="no chat template"):
        bare.chat(chat())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model_directory(tmp_path_factory.mktemp("models") / "tiny")


def test_a_real_model(directory: Path) -> None:
    model = load(card_from_directory(directory, name="tiny"))
    request = model.chat(chat([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]))
    text = f"{START}user\na\nb{END}\n{START}assistant\n"
    assert model.tokenizer.decode(request.token_ids, skip_special=False) == text
    tokenizer = model.tokenizer
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    assert request.eos_token_ids == [tokenizer.token_id(END), tokenizer.token_id(START)]
    assert model.completion(completion(), "hé").token_ids == tokenizer.encode("hé")
    with pytest.raises(InvalidRequest, match="maximum context length is 256"):
        model.completion(completion(), "a b " * 200)


def test_what_templates_get(tmp_path: Path) -> None:
    template = "{{ messages | tojson }}{{ (tools or []) | tojson }}{{ enable_thinking }}{{ reasoning_effort }}{{ x }}"
    directory = build_model_directory(tmp_path / "m", context_length=4096, tokenizer_config={"chat_template": template})
    model = load(card_from_directory(directory))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    odd = {"id": "2", "type": "function", "function": {"name": "f", "arguments": "{"}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call, odd]},
        {"role": "assistant", "reasoning_content": "r"},
        {"role": "tool", "content": "x", "tool_call_id": "1", "name": "f"},
    ]
    body = {"model": "m", "messages": messages, "tools": [TOOL], "thinking": {"type": "disabled"}, "reasoning_effort": "low"}
    request = parse_chat(msgspec.json.encode({**body, "chat_template_kwargs": {"x": "X"}}))
    rendered = model.render(request)
    call["function"] = {"name": "f", "arguments": {"a": 1}}
    seen = [messages[0], {"role": "assistant", "content": "", "reasoning_content": "r"}, messages[2]]
    decoder = json.JSONDecoder()
    given, end = decoder.raw_decode(rendered)
    assert given == [{key: message[key] for key in given[place]} for place, message in enumerate(seen)]
    assert list(given[0]) == ["role", "content", "tool_calls"]
    tools, rest = decoder.raw_decode(rendered[end:])
    assert tools == [TOOL]
    assert rendered[end + rest :] == "FalselowX"
    hidden = parse_chat(msgspec.json.encode({**body, "tool_choice": "none"}))
    assert "required" not in model.render(hidden)
    shown = msgspec.structs.replace(model.card, runtime_config=RuntimeConfig(exclude_tools_when_tool_choice_none=False))
    assert "required" in Preprocessor(shown, model.tokenizer, model.template).render(hidden)


@pytest.mark.parametrize("place", ["list", "jinja", "json"])
def test_where_templates_are_found(tmp_path: Path, place: str) -> None:
    source = "{{ messages[0].content }}{{ eos_token }}"
    inside: Any = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": source}]
    config = {"eos_token": {"content": "!"}, "chat_template": inside if place == "list" else "overridden"}
    directory = build_model_directory(tmp_path / "m", tokenizer_config=config)
    if place == "jinja":
        (directory / "chat_template.jinja").write_text(source)
    elif place == "json":
        (directory / "chat_template.json").write_bytes(msgspec.json.encode({"chat_template": source}))
    assert load(card_from_directory(directory)).render(chat("a")) == "a!"


@pytest.mark.parametrize(
    ("generation", "config", "ids"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 6}, (5,)),
        ({}, {"eos_token_id": [6, 7]}, (6, 7)),
        (None, {"text_config": {"eos_token_id": 8}}, (8,)),
        (None, {}, ()),
    ],
)
def test_where_end_of_sequence_ids_are_found(tmp_path: Path, generation: Any, config: Any, ids: tuple[int, ...]) -> None:
    directory = build_model_directory(tmp_path / "m", generation_config=generation, config=config)
    assert load(card_from_directory(directory)).tokenizer.eos_token_ids == ids


def test_a_model_without_any_template(tmp_path: Path) -> None:
    directory = build_model_directory(tmp_path / "m", tokenizer_config=None)
    assert load(card_from_directory(directory)).template is None


def test_model_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    directory = build_model_directory(tmp_path / "m")
    card = card_from_directory(directory)
    (directory / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json differs"):
        load(card)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UsageError, match=r"tokenizer\.json cannot be read"):
        load(card)
    with pytest.raises(UsageError, match=r"'x' has no tokenizer\.json"):
        load(ModelCard(display_name="x"))
    remote = File(path="hf://org/model/tokenizer.json", checksum="blake3:00")
    with pytest.raises(UsageError, match="remote"):
        load(ModelCard(display_name="x", tokenizer=TokenizerFile(hf_tokenizer_json=remote)))


def test_files_may_be_given_as_urls_of_local_files(tmp_path: Path) -> None:
    directory = build_model_directory(tmp_path / "with space")
    card = card_from_directory(directory)
    assert card.tokenizer is not None
    file = card.tokenizer.hf_tokenizer_json
    assert file is not None
    url = msgspec.structs.replace(file, path=(directory / "tokenizer.json").as_uri())
    assert load(msgspec.structs.replace(card, tokenizer=TokenizerFile(hf_tokenizer_json=url))).tokenizer.vocab_size > 256
