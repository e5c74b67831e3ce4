"""Chat templates: messages to one prompt text.

Models ship Jinja templates; they run in a sandbox that can change nothing. The byte tokenizer has a template of its own without
Jinja: the texts of the messages, joined by newlines and nothing else, so that the prompt of a single message is that message,
and an engine that echoes its prompt answers a user with the user's text, byte for byte.
"""

import json
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from stator.clock import Clock
from stator.errors import UsageError
from stator.llm.body import InvalidRequest

if TYPE_CHECKING:
    import jinja2

__all__ = ["ChatTemplate", "JinjaTemplate", "PlainTemplate"]

Message = dict[str, Any]


class ChatTemplate(Protocol):
    """Renders a conversation up to where the assistant speaks next."""

    def render(self, messages: list[Message], *, tools: list[dict[str, Any]] | None, variables: dict[str, Any]) -> str:
        """The prompt text. Each message has `role` and `content` (a string or None) and what else the client gave.

        `variables` are the client's `chat_template_args`. Raises `InvalidRequest` when the template refuses the messages.
        """
        ...


class PlainTemplate:
    """The contents joined by newlines; roles, tools and variables leave no trace."""

    def render(self, messages: list[Message], *, tools: list[dict[str, Any]] | None, variables: dict[str, Any]) -> str:
        return "\n".join(message.get("content") or "" for message in messages)


class JinjaTemplate:
    """A model's template, compiled once. Raises `UsageError` when it does not compile or the extra is missing."""

    def __init__(self, source: str, *, clock: Clock, bos_token: str = "", eos_token: str = "") -> None:
        self._template = _compile(source, clock)
        self._constants = {"bos_token": bos_token, "eos_token": eos_token, "add_generation_prompt": True}
        # Models that do not know OpenAI's newer name for the system role would refuse it.
        self._knows_developer = "developer" in source

    def render(self, messages: list[Message], *, tools: list[dict[str, Any]] | None, variables: dict[str, Any]) -> str:
        if not self._knows_developer:
            messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
        given = {**self._constants, **variables, "messages": messages}
        if tools:
            given["tools"] = tools
        try:
            return self._template.render(given)
        except (MemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # a template can raise whatever its expressions do
            text = getattr(error, "message", None) or str(error) or type(error).__name__
            message = f"The chat template of this model refused the messages: {text}"
            raise InvalidRequest(message, param="messages", code="invalid_messages") from error


def _compile(source: str, clock: Clock) -> "jinja2.Template":
    try:
        import jinja2
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise UsageError("chat templates need the extra 'models': pip install 'stator[models]'") from error

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks answers for training; here it only shows what is inside."""

        tags = {"generation"}  # noqa: RUF012 - the base class declares it so

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.fromtimestamp(clock.wall()).strftime(layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson  # pyright: ignore[reportUnknownMemberType] - jinja2 leaves the dict untyped
    for helper in (raise_exception, strftime_now):
        environment.globals[helper.__name__] = helper  # pyright: ignore[reportUnknownMemberType] - likewise
    try:
        template = environment.from_string(source)
    except jinja2.TemplateError as error:
        raise UsageError(f"the chat template of the model does not compile: {error}") from error
    template.globals = dict(template.globals)  # a chain of maps before, which each rendering would copy key by key
    return template


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as models were trained on: no HTML escapes, non-ASCII characters as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
