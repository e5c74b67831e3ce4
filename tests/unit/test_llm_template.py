"""Chat templates: the plain one, and Jinja in its sandbox."""

import sys
from typing import Any

import pytest

from stator.errors import UsageError
from stator.llm.body import InvalidRequest
from stator.llm.template import JinjaTemplate, PlainTemplate
from stator.testing.manual_clock import ManualClock

USER = {"role": "user", "content": "hé 🎉"}


def render(source: str, messages: list[dict[str, Any]] | None = None, **given: Any) -> str:
    template = JinjaTemplate(source, clock=ManualClock(), bos_token="<s>", eos_token="</s>")
    return template.render(messages or [USER], tools=given.pop("tools", None), variables=given)


def test_the_plain_template_is_the_contents() -> None:
    template = PlainTemplate()
    assert template.render([USER], tools=[{}], variables={"x": 1}) == "hé 🎉"
    messages = [{"role": "system", "content": "a"}, {"role": "assistant", "content": None}, USER]
    assert template.render(messages, tools=None, variables={}) == "a\n\nhé 🎉"


def test_what_a_template_sees() -> None:
    source = "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}{% endfor %}"
    assert render(source) == "<s>user:hé 🎉</s>"
    assert render("{% if add_generation_prompt %}yes{% endif %}{{ tools is defined }}") == "yesFalse"
    assert render("{{ tools[0].a }}{{ enable_thinking }}", tools=[{"a": 1}], enable_thinking=False) == "1False"
    assert render("{{ add_generation_prompt }}{{ messages[0].role }}", add_generation_prompt=False, messages=[]) == "Falseuser"


def test_blocks_leave_no_lines_behind() -> None:
    assert render("{% if true %}\n  a\n  {% endif %}\nb") == "  a\nb"


def test_tojson_is_plain_json() -> None:
    assert render("{{ x | tojson }}", x={"k": "<é>"}) == '{"k": "<é>"}'
    assert render("{{ x | tojson(indent=1) }}", x=[1]) == "[\n 1\n]"


def test_the_time_is_the_clocks() -> None:
    assert render("{{ strftime_now('%Y') }}") == "2023"


def test_loop_controls_and_generation_blocks() -> None:
    source = "{% for n in [1,2,3] %}{% if n == 2 %}{% break %}{% endif %}{% generation %}{{ n }}{% endgeneration %}{% endfor %}"
    assert render(source) == "1"


def test_developer_becomes_system_for_templates_that_do_not_know_it() -> None:
    messages = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", messages) == "system"
    assert render("{# developer #}{{ messages[0].role }}", messages) == "developer"
    assert messages[0]["role"] == "developer"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ nothing.at.all }}", "nothing"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ messages[0].content + 1 }}", "str"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% for i in range(10**9) %}{% endfor %}", "[Rr]ange"),
    ],
)
def test_a_template_that_fails_is_the_requests_fault(source: str, text: str) -> None:
    with pytest.raises(InvalidRequest, match=text) as caught:
        render(source)
    assert (caught.value.param, caught.value.status) == ("messages", 400)


def test_a_template_that_does_not_compile_is_named_at_once() -> None:
    with pytest.raises(UsageError, match="does not compile") as caught:
        JinjaTemplate("{% if %}", clock=ManualClock())
    assert not isinstance(caught.value, InvalidRequest)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(UsageError, match=r"pip install 'stator\[models\]'"):
        JinjaTemplate("x", clock=ManualClock())
    assert PlainTemplate().render([USER], tools=None, variables={}) == "hé 🎉"
