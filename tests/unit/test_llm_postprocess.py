"""From items to deltas: text, ends, counts, log probabilities."""

import pytest

from stator.errors import EngineError
from stator.llm.output import CompletionUsage, EngineOutput, FinishError, TopLogprob
from stator.llm.postprocess import Postprocessor, TextDelta, TokenLogprob
from stator.llm.request import OutputOptions, PreprocessedRequest, SamplingOptions, StopConditions
from stator.llm.tokenizer import ByteTokenizer

END = ByteTokenizer.END
TOKENIZER = ByteTokenizer()


def open_choice(
    stop: StopConditions | None = None,
    output: OutputOptions | None = None,
    *,
    include: bool | None = None,
    top: int | None = None,
) -> Postprocessor:
    request = PreprocessedRequest(
        token_ids=[1],
        eos_token_ids=[END, 258],
        stop_conditions=stop or StopConditions(),
        output_options=output or OutputOptions(),
        sampling_options=SamplingOptions(include_stop_str_in_output=include),
    )
    return Postprocessor(TOKENIZER, request, top_logprobs=top)


def item(text: str | bytes, finish: str | None = None) -> EngineOutput:
    return EngineOutput(token_ids=list(text.encode() if isinstance(text, str) else text), finish_reason=finish)


def one_by_one(text: str) -> list[EngineOutput]:
    return [EngineOutput(token_ids=[token]) for token in text.encode()]


def test_plain_tokens() -> None:
    choice = open_choice()
    assert choice.push_many(one_by_one("aé")) == [TextDelta("a", 1), TextDelta("é", 2)]
    assert choice.push(item("!!")) == TextDelta("!!", 2)
    assert choice.push(item("", "length")) == TextDelta("", 0, "length")
    assert choice.done
    assert choice.completion_tokens == 5
    assert choice.push(item("x")) is None
    assert choice.push_many([item("x", "stop")]) == []
    assert choice.finish() is None


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("eos", "stop"),
        ("stop", "stop"),
        ("cancelled", "stop"),
        ("abort", "stop"),
        ("length", "length"),
        ("content_filter", "content_filter"),
    ],
)
def test_finish_reasons_of_workers(reason: str, shown: str) -> None:
    assert open_choice().push(item("a", reason)) == TextDelta("a", 1, shown)


def test_a_stop_reason_of_the_worker_is_passed_on() -> None:
    output = EngineOutput(token_ids=[97], finish_reason="stop", stop_reason="x")
    assert open_choice().push(output) == TextDelta("a", 1, "stop", "x")


def test_errors_of_workers_are_raised() -> None:
    with pytest.raises(EngineError, match="out of memory"):
        open_choice().push(EngineOutput(token_ids=[97], finish_reason=FinishError("out of memory")))
    with pytest.raises(EngineError, match="'tool_calls'"):
        open_choice().push(item("a", "tool_calls"))


def test_an_end_of_sequence_token_is_counted_and_not_shown() -> None:
    choice = open_choice()
    assert choice.push(item("a")) == TextDelta("a", 1)
    assert choice.push(EngineOutput(token_ids=[98, END, 99, 100])) == TextDelta("b", 2, "stop")
    assert choice.done
    assert choice.completion_tokens == 3


def test_an_end_of_sequence_token_with_the_workers_own_finish() -> None:
    assert open_choice().push(EngineOutput(token_ids=[END], finish_reason="eos")) == TextDelta("", 1, "stop")


def test_special_tokens_that_end_nothing_are_hidden_unless_asked_for() -> None:
    assert open_choice().push(EngineOutput(token_ids=[257])) is None
    shown = open_choice(output=OutputOptions(skip_special_tokens=False))
    assert shown.push(EngineOutput(token_ids=[257])) == TextDelta("<|im_start|>", 1)
    assert shown.push(EngineOutput(token_ids=[END])) == TextDelta("", 1, "stop")


def test_stop_token_ids_hidden_and_visible() -> None:
    hidden = open_choice(StopConditions(stop_token_ids=[98]))
    assert hidden.push(item("abc")) == TextDelta("a", 2, "stop", 98)
    visible = open_choice(StopConditions(stop_token_ids_visible=[98]))
    assert visible.push(item("abc")) == TextDelta("ab", 2, "stop", 98)


def test_ignore_eos() -> None:
    choice = open_choice(StopConditions(ignore_eos=True, max_tokens=3))
    assert choice.push(EngineOutput(token_ids=[97, END, 98], finish_reason="length")) == TextDelta("ab", 3, "length")


def test_nothing_ends_before_min_tokens() -> None:
    choice = open_choice(StopConditions(min_tokens=2, stop=["c"], stop_token_ids=[100]))
    assert choice.push(EngineOutput(token_ids=[END, 97])) == TextDelta("a", 2)
    assert choice.push(EngineOutput(token_ids=[END])) == TextDelta("", 1, "stop")
    early = open_choice(StopConditions(min_tokens=3, stop=["c"], stop_token_ids=[100]))
    assert early.push(item("cd")) == TextDelta("c", 2)
    assert early.push(item("bc")) == TextDelta("b", 2, "stop", "c")
    only_text = open_choice(StopConditions(stop=["b"]))
    assert only_text.push(EngineOutput(token_ids=[], text="abc")) == TextDelta("a", 0, "stop", "b")


def test_a_worker_that_ignores_max_tokens_is_cut() -> None:
    choice = open_choice(StopConditions(max_tokens=3))
    assert choice.push_many(one_by_one("abc")) == [TextDelta("a", 1), TextDelta("b", 1), TextDelta("c", 1)]
    assert not choice.done
    assert choice.push(item("d")) == TextDelta("", 0, "length")
    assert choice.done
    assert choice.completion_tokens == 3
    assert open_choice(StopConditions(max_tokens=2)).push(item("abc", "stop")) == TextDelta("ab", 2, "length")


def test_a_stream_that_just_ends() -> None:
    choice = open_choice(StopConditions(max_tokens=3))
    choice.push(item("ab"))
    assert choice.finish() == TextDelta("", 0, "stop")
    full = open_choice(StopConditions(max_tokens=2))
    full.push(item("ab"))
    assert full.finish() == TextDelta("", 0, "length")
    assert open_choice().finish() == TextDelta("", 0, "stop")
    assert full.done
    assert full.finish() is None


def test_half_a_character_at_the_end_is_flushed() -> None:
    choice = open_choice()
    assert choice.push(item(b"a\xf0\x9f")) == TextDelta("a", 3)
    assert choice.finish() == TextDelta("\ufffd", 0, "stop")
    cut = open_choice(StopConditions(max_tokens=1))
    assert cut.push(item(b"\xf0\x9f", "length")) == TextDelta("\ufffd", 1, "length")


def test_stop_strings_across_items() -> None:
    choice = open_choice(StopConditions(stop=["o wor", "zzz"]))
    shown = choice.push_many([item("hello"), item(" world"), item("never")])
    assert shown == [TextDelta("hell", 5), TextDelta("", 4, "stop", "o wor")]
    assert choice.completion_tokens == 9
    kept = open_choice(StopConditions(stop=["o wor"]), include=True)
    assert kept.push_many([item("hello"), item(" world")]) == [TextDelta("hell", 5), TextDelta("o wor", 4, "stop", "o wor")]


def test_text_held_back_for_nothing_comes_with_the_end() -> None:
    choice = open_choice(StopConditions(stop=["abc"]))
    assert choice.push(item("ab")) is None
    assert choice.push(item("", "length")) == TextDelta("ab", 2, "length")
    silent = open_choice(StopConditions(stop=["abc"]))
    silent.push(item("xab"))
    assert silent.finish() == TextDelta("ab", 0, "stop")
    ended = open_choice(StopConditions(stop=["abc"]))
    assert ended.push(EngineOutput(token_ids=[97, 98, END])) == TextDelta("ab", 3, "stop")


def test_a_stop_string_wins_over_the_workers_reason() -> None:
    choice = open_choice(StopConditions(stop=["b"]))
    assert choice.push(item("abc", "length")) == TextDelta("a", 2, "stop", "b")


def test_a_replacement_character_at_the_flush_can_be_a_stop_string() -> None:
    choice = open_choice(StopConditions(stop=["\ufffd"]))
    choice.push(item(b"a\xf0"))
    assert choice.finish() == TextDelta("", 0, "stop", "\ufffd")


def test_the_workers_text_is_used_instead_of_decoding() -> None:
    choice = open_choice()
    assert choice.push(EngineOutput(token_ids=[1, 2], text="from the worker")) == TextDelta("from the worker", 2)
    assert choice.push(EngineOutput(token_ids=[], text="more")) == TextDelta("more", 0)
    # Where a rule cuts the item, its text belongs to too many tokens.
    assert choice.push(EngineOutput(token_ids=[97, END, 98], text="a??b")) == TextDelta("a", 2, "stop")
    stopped = open_choice(StopConditions(stop=["th"]))
    assert stopped.push(EngineOutput(token_ids=[1, 2], text="from the worker")) == TextDelta("from ", 2, "stop", "th")


def test_the_workers_usage_is_kept() -> None:
    choice = open_choice()
    usage = CompletionUsage(prompt_tokens=7, prompt_tokens_details={"cached_tokens": 4})
    choice.push(EngineOutput(token_ids=[97], completion_usage=usage))
    choice.push(item("b"))
    assert choice.usage == usage


def entry(token: str, logprob: float, *, top: list[TokenLogprob] | None = None) -> TokenLogprob:
    return TokenLogprob(token=token, token_id=ord(token), logprob=logprob, bytes=[ord(token)], top=top or [])


def scored(text: str, *, finish: str | None = None) -> EngineOutput:
    tops = [[TopLogprob(rank=1, token_id=ord(c), logprob=-0.5), TopLogprob(rank=2, token_id=90, logprob=-1.5)] for c in text]
    return EngineOutput(token_ids=list(text.encode()), log_probs=[-0.5] * len(text), top_logprobs=tops, finish_reason=finish)


def test_log_probabilities_come_with_their_text() -> None:
    choice = open_choice(output=OutputOptions(logprobs=2))
    delta = choice.push(scored("a"))
    assert delta is not None
    assert delta.logprobs == [entry("a", -0.5, top=[entry("a", -0.5), entry("Z", -1.5)])]
    fewer = open_choice(output=OutputOptions(logprobs=2), top=0).push(scored("ab"))
    assert fewer is not None
    assert fewer.logprobs == [entry("a", -0.5), entry("b", -0.5)]


def test_log_probabilities_of_held_back_text_wait_and_those_of_a_stop_string_vanish() -> None:
    choice = open_choice(StopConditions(stop=["bcd"]), OutputOptions(logprobs=0))
    first, second = choice.push_many([scored("ab"), scored("c"), scored("x")])
    assert first.logprobs == [entry("a", -0.5)]
    assert (second.text, second.logprobs) == ("bcx", [entry("b", -0.5), entry("c", -0.5), entry("x", -0.5)])
    last = choice.push(scored("ybcd"))
    assert last is not None
    assert (last.text, last.logprobs) == ("y", [entry("y", -0.5)])


def test_log_probabilities_of_parts_of_a_character() -> None:
    choice = open_choice(output=OutputOptions(logprobs=0))
    deltas = choice.push_many(EngineOutput(token_ids=[t], log_probs=[-1.0]) for t in "é".encode())
    assert len(deltas) == 1
    assert [part.bytes for part in deltas[0].logprobs or []] == [[0xC3], [0xA9]]
    assert choice.push(EngineOutput(token_ids=[0xC3], log_probs=[None])) is None
    last = choice.finish()
    assert last is not None
    assert [part.logprob for part in last.logprobs or []] == [-9999.0]


def test_log_probabilities_not_asked_for_are_dropped_and_missing_ones_are_none() -> None:
    assert open_choice().push(scored("a")) == TextDelta("a", 1)
    assert open_choice(output=OutputOptions(logprobs=1)).push(item("a")) == TextDelta("a", 1)
    text_only = EngineOutput(token_ids=[], text="a", log_probs=[-1.0])
    assert open_choice(output=OutputOptions(logprobs=1)).push(text_only) == TextDelta("a", 0)


def test_tokens_written_as_ids_and_texts_given_by_the_worker() -> None:
    options = OutputOptions(logprobs=1, return_tokens_as_token_ids=True)
    delta = open_choice(output=options).push(scored("a"))
    assert delta is not None
    assert delta.logprobs is not None
    assert [(part.token, part.bytes) for part in (delta.logprobs[0], *delta.logprobs[0].top)] == [("token_id:97", [97])] * 2
    given = EngineOutput(
        token_ids=[97], log_probs=[-1.0], top_logprobs=[[TopLogprob(token_id=97, token="é", logprob=float("-inf"))]]
    )
    named = open_choice(output=OutputOptions(logprobs=1)).push(given)
    assert named is not None
    assert named.logprobs is not None
    assert (named.logprobs[0].token, named.logprobs[0].bytes, named.logprobs[0].top[0].logprob) == ("é", [0xC3, 0xA9], -9999.0)
