"""`stator serve` as a user runs it, and the official client: 200 mixed requests, every character intact, every worker used."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import msgspec
import openai
import pytest

from stator.testing.serve_process import StatorProcess, run_stator

pytestmark = pytest.mark.timeout(120)

TEXTS = (
    "Hello from Stator!",
    "Grüße aus Köln — schöne Füße, „Anführung“ und ß",
    "定子静止不动，而其他一切都在旋转。静止は力なり。고정자는 움직이지 않는다",
    "الجزء الثابت لا يدور بينما يدور كل شيء آخر",
    "Статор неподвижен, пока всё остальное вращается",
    "🚀🙂👩‍👩‍👧‍👦🏳️‍🌈 family and flags 🇩🇪🇯🇵 e\u0301 combining",
    'नमस्ते दुनिया — \u2028 line separator, \t tab, \\ and "quotes" {json: [1, 2]} \x00 nul',
    "x" * 3000 + "é" * 500,
)


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One request and what must come back."""

    chat: bool
    stream: bool
    text: str
    n: int = 1
    stop: str = ""
    max_tokens: int | None = None
    include_usage: bool = False

    @property
    def expected(self) -> tuple[str, str]:
        """The answer's text and its finish reason."""
        data = self.text.encode()
        cut = self.text.find(self.stop) if self.stop else -1
        if cut >= 0 and (self.max_tokens is None or len((self.text[:cut] + self.stop).encode()) <= self.max_tokens):
            return self.text[:cut], "stop"
        if self.max_tokens is not None and self.max_tokens < len(data):
            return data[: self.max_tokens].decode(), "length"
        return self.text, "stop"

    def options(self) -> dict[str, object]:
        """What is sent, beside model and prompt."""
        options: dict[str, object] = {"n": self.n, "stream": self.stream}
        if self.stop:
            options["stop"] = [self.stop, "never there"]
        if self.max_tokens is not None:
            options["max_tokens"] = self.max_tokens
        if self.stream and self.include_usage:
            options["stream_options"] = {"include_usage": True}
        return options


def mixed_cases(count: int, random: Random) -> list[Case]:
    cases: list[Case] = []
    for number in range(count):
        text = f"{number}: {random.choice(TEXTS)} #{random.getrandbits(32):x}"
        stop, limit = "", None
        if random.random() < 0.3:
            begin = random.randrange(len(text) - 4)
            stop = text[begin : begin + random.randint(1, 4)]
        if random.random() < 0.3:
            limit = len(text[: random.randint(1, len(text))].encode())
        cases.append(
            Case(
                chat=random.random() < 0.5,
                stream=random.random() < 0.6,
                text=text,
                n=random.choice((1, 1, 1, 2, 3)),
                stop=stop,
                max_tokens=limit,
                include_usage=random.random() < 0.5,
            )
        )
    return cases


class Answer:
    """What came back, put together."""

    def __init__(self, n: int) -> None:
        self.texts = [""] * n
        self.reasons: list[str | None] = [None] * n
        self.usage: openai.types.CompletionUsage | None = None

    def add_chunk(self, chunk: object, *, chat: bool) -> None:
        for choice in chunk.choices:  # pyright: ignore
            text = choice.delta.content if chat else choice.text
            self.texts[choice.index] += text or ""
            self.reasons[choice.index] = self.reasons[choice.index] or choice.finish_reason
        self.usage = getattr(chunk, "usage", None) or self.usage

    def add_whole(self, answer: object, *, chat: bool) -> None:
        for choice in answer.choices:  # pyright: ignore
            self.texts[choice.index] = choice.message.content if chat else choice.text
            self.reasons[choice.index] = choice.finish_reason
        self.usage = answer.usage  # pyright: ignore

    def check(self, case: Case) -> None:
        text, reason = case.expected
        assert self.texts == [text] * case.n, case
        assert self.reasons == [reason] * case.n, case
        if case.include_usage or not case.stream:
            assert self.usage is not None
            assert self.usage.prompt_tokens == len(case.text.encode())
            assert self.usage.total_tokens == self.usage.prompt_tokens + self.usage.completion_tokens
        else:
            assert self.usage is None


@pytest.fixture(scope="module")
def service() -> Iterator[StatorProcess]:
    environment = {"STATOR_LOG": "info,stator.worker.worker=debug"}
    with StatorProcess("serve", "--isolated", "--workers", "2", "--port", "0", environment=environment) as process:
        process.wait_until_ready(workers=2)
        yield process


@pytest.fixture(scope="module")
def url(service: StatorProcess) -> str:
    return service.wait_until_ready()


async def _send(client: openai.AsyncOpenAI, case: Case) -> Answer:
    answer = Answer(case.n)
    if case.chat:
        messages = [{"role": "user", "content": case.text}]
        sent = client.chat.completions.create(model="echo", messages=messages, **case.options())  # pyright: ignore
    else:
        sent = client.completions.create(model="echo", prompt=case.text, **case.options())  # pyright: ignore
    result = await sent
    if case.stream:
        async for chunk in result:
            answer.add_chunk(chunk, chat=case.chat)
    else:
        answer.add_whole(result, chat=case.chat)
    return answer


def _send_sync(client: openai.OpenAI, case: Case) -> Answer:
    answer = Answer(case.n)
    if case.chat:
        messages = [{"role": "user", "content": case.text}]
        result = client.chat.completions.create(model="echo", messages=messages, **case.options())  # pyright: ignore
    else:
        result = client.completions.create(model="echo", prompt=case.text, **case.options())  # pyright: ignore
    if case.stream:
        for chunk in result:
            answer.add_chunk(chunk, chat=case.chat)
    else:
        answer.add_whole(result, chat=case.chat)
    return answer


async def _send_all(url: str, cases: list[Case]) -> None:
    """32 at a time."""
    gate = asyncio.Semaphore(32)
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:

        async def one(case: Case) -> None:
            async with gate:
                (await _send(client, case)).check(case)

        async with asyncio.TaskGroup() as group:
            for case in cases:
                group.create_task(one(case))


def test_200_mixed_requests_of_the_async_client(service: StatorProcess, url: str) -> None:
    cases = mixed_cases(200, Random(7))
    printed = len(service.lines)
    asyncio.run(_send_all(url, cases))
    taken = Counter(found.group(1) for line in service.lines[printed:] if (found := re.search(r"at instance (\w+)", line)))
    assert len(taken) == 2, "both workers get requests"
    assert min(taken.values()) > 0.3 * sum(taken.values()), taken


def test_mixed_requests_of_the_sync_client(url: str) -> None:
    cases = mixed_cases(48, Random(8))
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client,
        ThreadPoolExecutor(8) as threads,
    ):
        for case, answer in zip(cases, threads.map(lambda case: _send_sync(client, case), cases), strict=True):
            answer.check(case)


@pytest.mark.parametrize("text", TEXTS[:-1], ids=range(len(TEXTS) - 1))
def test_no_chunk_ends_inside_a_character(url: str, text: str) -> None:
    """The byte tokenizer splits every character of several bytes over tokens; what arrives never is."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        chunks = [chunk.choices[0].text for chunk in client.completions.create(model="echo", prompt=text, stream=True)]
    assert "".join(chunks).encode() == text.encode()
    assert not any("\ufffd" in chunk for chunk in chunks)
    assert len(chunks) >= len(text)


def test_the_printed_curl_line_answers(service: StatorProcess) -> None:
    with StatorProcess(command=("bash", "-c", service.wait_for(r"^curl .*").group(0) + " --silent --max-time 20")) as curl:
        assert curl.wait() == 0
    events = [line.removeprefix("data: ") for line in curl.lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    deltas = [json.loads(event)["choices"][0]["delta"] for event in events[:-1]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Hello from Stator! 👋"


def test_one_model_is_listed(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=10) as client:
        assert [model.id for model in client.models.list()] == ["echo"]
        with pytest.raises(openai.NotFoundError, match="`nobody` does not exist"):
            client.completions.create(model="nobody", prompt="x")


def test_without_uvloop_and_extras_on_the_compatible_plane(tmp_path: Path) -> None:
    """What `stator[serve]` needs is enough, uvloop is a luxury, and the other plane says the same."""
    for name in ("uvloop", "tokenizers", "jinja2", "torch", "transformers"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('hidden', name='{name}')\n")
    environment = {"PYTHONPATH": str(tmp_path), "STATOR_PLANE": "compatible"}
    with StatorProcess("serve", "--isolated", "--workers", "2", "--port", "0", environment=environment) as process:
        asyncio.run(_send_all(process.wait_until_ready(workers=2), mixed_cases(64, Random(9))))


def test_without_the_extra_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError('hidden', name='typer')\n")
    found = run_stator("serve", environment={"PYTHONPATH": str(tmp_path)})
    assert found.returncode == 1
    assert found.stderr == 'the command line needs an extra: pip install "stator[serve]"\n'
