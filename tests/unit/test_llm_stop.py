"""Stop rules: what a request says, and what of a growing text may be shown."""

import pytest

from stator.llm.request import PreprocessedRequest, SamplingOptions, StopConditions
from stator.llm.stop import StopMatch, StopRules, StopScanner


def run(strings: tuple[str, ...], pieces: list[str], *, include: bool = False) -> tuple[list[str], str | None]:
    """Feed `pieces`: what each showed (the release as the last), and the string that matched."""
    scanner = StopScanner(strings, include=include)
    shown: list[str] = []
    for piece in pieces:
        result = scanner.feed(piece)
        if isinstance(result, StopMatch):
            return [*shown, result.text], result.string
        shown.append(result)
    return [*shown, scanner.release()], None


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    assert run(("o wor",), ["hell", "o", " w", "orld"]) == (["hell", "", "", ""], "o wor")
    assert run(("o wor",), ["hello", " w", "ind"]) == (["hell", "", "o wind", ""], None)
    assert run(("END",), ["the E", "N"]) == (["the ", "", "EN"], None)


def test_a_match_is_cut_or_kept() -> None:
    assert run(("stop",), ["do not stop here"]) == (["do not "], "stop")
    assert run(("stop",), ["do not st", "op here"], include=True) == (["do not ", "stop"], "stop")


def test_a_failed_beginning_may_contain_another() -> None:
    assert run(("aab",), ["a", "a", "a", "a", "b", "c"]) == (["", "", "a", "a", ""], "aab")
    assert run(("abab!",), ["ababab!"]) == (["ab"], "abab!")


@pytest.mark.parametrize(
    ("strings", "text", "shown", "matched"),
    [
        (("world", "lo"), "hello world", "hel", "lo"),
        (("b", "ab"), "xab", "x", "ab"),
        (("abc", "b"), "zabc", "za", "b"),
        (("é🎉",), "aé🎉b", "a", "é🎉"),
    ],
)
def test_the_match_that_ends_first_counts_and_of_those_the_longest(
    strings: tuple[str, ...], text: str, shown: str, matched: str
) -> None:
    for pieces in ([text], list(text)):
        parts, found = run(strings, pieces)
        assert ("".join(parts), found) == (shown, matched)


def test_unarmed_text_ends_nothing_but_may_begin_a_match() -> None:
    scanner = StopScanner(("ab",))
    assert scanner.feed("ab a", armed=False) == "ab "
    assert scanner.feed("b") == StopMatch("", "ab")
    overlapping = StopScanner(("aa",))
    assert overlapping.feed("aa", armed=False) == "a"
    assert overlapping.feed("a") == StopMatch("", "aa")


def test_a_long_string_costs_time_linear_in_the_text() -> None:
    scanner = StopScanner(("a" * 1000 + "b",))
    shown = sum(len(str(scanner.feed("a"))) for _ in range(5000))
    assert shown == 4000
    assert scanner.release() == "a" * 1000


def request(stop: StopConditions, *, eos: list[int] | None = None, include: bool | None = None) -> PreprocessedRequest:
    return PreprocessedRequest(
        token_ids=[1],
        stop_conditions=stop,
        eos_token_ids=eos or [],
        sampling_options=SamplingOptions(include_stop_str_in_output=include),
    )


def test_rules_of_a_request() -> None:
    rules = StopRules.of(
        request(
            StopConditions(
                max_tokens=9,
                stop=["x"],
                stop_token_ids=[5, 6, 2],
                stop_token_ids_visible=[6],
                stop_token_ids_hidden=[2, 3],
                min_tokens=4,
            ),
            eos=[1],
            include=True,
        )
    )
    assert rules == StopRules(
        strings=("x",),
        include_string=True,
        silent=frozenset((1, 3)),
        reported=frozenset((5, 2)),
        visible=frozenset((6,)),
        min_tokens=4,
        max_tokens=9,
    )
    assert StopRules.of(request(StopConditions())) == StopRules()


def test_ignoring_the_end_of_sequence_keeps_the_clients_own_rules() -> None:
    rules = StopRules.of(request(StopConditions(ignore_eos=True, stop=["x"], stop_token_ids=[5]), eos=[1]))
    assert (rules.silent, rules.reported, rules.strings) == (frozenset(), frozenset((5,)), ("x",))
