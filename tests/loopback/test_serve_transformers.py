"""A real model from the official client to torch and back: the tokens of `model.generate`, in order, and slots that come free."""

import asyncio
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from stator.testing.serve_process import StatorProcess, running
from stator.testing.tiny_model import build_tiny_llama

torch = pytest.importorskip("torch", reason="needs the extra 'transformers'")
pytestmark = [pytest.mark.torch, pytest.mark.timeout(120)]

PROMPTS = (
    "The stator",
    "定子在",
    "Der Ständer steht still, während",
    "🚀🙂",
    "def generate(",
    "Статор",
    "x",
    "while everything else spins",
)
RUNNING, WAITING = 8, 4


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_llama(tmp_path_factory.mktemp("models") / "tiny", context_length=4096)


@pytest.fixture(scope="module")
def service(directory: Path) -> Iterator[StatorProcess]:
    arguments = ("--model", directory.name, "--option", f"max_num_seqs={RUNNING}", "--option", f"max_waiting={WAITING}")
    with StatorProcess("serve", "--isolated", "--port", "0", *arguments, directory=directory.parent) as process:
        process.wait_until_ready(timeout=90)
        yield process


@pytest.fixture(scope="module")
def url(service: StatorProcess) -> str:
    return f"{service.wait_until_ready()}/v1"


class Reference:
    """The model as the library itself runs it, in float32."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        decoder = {char: byte for byte, char in _byte_characters().items()}
        self.pieces = {
            id: bytes(decoder[char] for char in piece) if all(char in decoder for char in piece) else piece.encode()
            for piece, id in self.tokenizer.get_vocab().items()
        }

    def generate(self, ids: list[int], count: int) -> list[int]:
        """Greedy; without the prompt and the end token."""
        prompt = torch.tensor([ids])
        found = self.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
        )[0, len(ids) :].tolist()
        return found[:-1] if found[-1] == self.tokenizer.eos_token_id else found

    def chat(self, text: str) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return self.tokenizer.encode(rendered, add_special_tokens=False)


def _byte_characters() -> dict[int, str]:
    """GPT-2's table: how byte-level vocabularies write each byte."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


@pytest.fixture(scope="module")
def reference(directory: Path) -> Reference:
    return Reference(directory)


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60)


def test_greedy_chats_are_token_identical_to_generate(url: str, reference: Reference) -> None:
    with client_of(url) as client, ThreadPoolExecutor(RUNNING) as threads:

        def ask(text: str) -> tuple[list[bytes], int]:
            answer = client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": text}], max_tokens=40, temperature=0, logprobs=True
            )
            logprobs = answer.choices[0].logprobs
            assert logprobs is not None
            assert logprobs.content is not None
            assert answer.usage is not None
            return [bytes(entry.bytes or ()) for entry in logprobs.content], answer.usage.prompt_tokens

        for text, (pieces, length) in zip(PROMPTS * 2, threads.map(ask, PROMPTS * 2), strict=True):
            ids = reference.chat(text)
            assert length == len(ids)
            assert pieces == [reference.pieces[id] for id in reference.generate(ids, 40)]


def test_greedy_completions_stream_what_generate_says(url: str, reference: Reference) -> None:
    with client_of(url) as client, ThreadPoolExecutor(RUNNING) as threads:

        def ask(ids: list[int]) -> str:
            stream = client.completions.create(model="tiny", prompt=ids, max_tokens=40, temperature=0, stream=True)
            return "".join(chunk.choices[0].text for chunk in stream)

        prompts = [reference.tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS]
        for ids, text in zip(prompts, threads.map(ask, prompts), strict=True):
            expected = reference.tokenizer.decode(
                reference.generate(ids, 40), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            assert text == expected


def test_a_client_that_leaves_frees_its_slot(url: str) -> None:
    """All slots and places in the queue are taken by answers that take seconds; one leaves, and one more gets in at once."""

    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:

            async def endless() -> openai.AsyncStream[Any]:
                return await client.completions.create(
                    model="tiny", prompt=[5, 6, 7], max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
                )

            streams = [await endless() for _ in range(RUNNING)]
            waiting = [asyncio.create_task(endless()) for _ in range(WAITING)]
            refused = ""
            for _ in range(50):
                await asyncio.sleep(0.02)
                try:
                    await client.completions.create(model="tiny", prompt=[5], max_tokens=1, timeout=0.5)
                except openai.APITimeoutError:
                    continue  # it found a place in the queue before the four did
                except openai.InternalServerError as error:
                    refused = str(error)
                    break
            assert "at capacity" in refused
            began = time.monotonic()
            for stream in streams[:5]:
                await stream.close()
            for task in waiting:
                await (await task).close()
            patient = client.with_options(max_retries=5)  # a worker that refused is left alone for a moment
            answer = await patient.completions.create(model="tiny", prompt=[5], max_tokens=1)
            assert answer.choices[0].finish_reason == "length"
            assert time.monotonic() - began < 4, "nobody had to wait for a whole answer"
            for stream in streams[5:]:
                await stream.close()

    asyncio.run(main())


def test_progress_and_threads(service: StatorProcess, directory: Path) -> None:
    lines = [line for line in service.lines if "worker 1:" in line]
    words = ["importing torch and transformers", f"loading {directory.name}", "loaded", "ready, serves tiny"]
    places = [next(place for place, line in enumerate(lines) if word in line) for word in words]
    assert places == sorted(places)
    (pid,) = service.children("worker")
    cores = len(psutil.Process().cpu_affinity())
    assert psutil.Process(pid).environ()["OMP_NUM_THREADS"] == str(cores)


def test_a_signal_while_the_model_is_loading_ends_everything(directory: Path) -> None:
    with StatorProcess("serve", "--isolated", "--port", "0", "--workers", "2", "--model", str(directory)) as process:
        process.wait_for("worker 1: importing torch")
        process.wait_for("worker 2: importing torch")
        children = process.children()
        began = time.monotonic()
        process.send(signal.SIGINT)
        assert process.wait(15) == 0
        assert time.monotonic() - began < 8
        assert running(children) == []


def test_a_model_that_cannot_be_fetched_is_one_line() -> None:
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with StatorProcess("serve", "--isolated", "--port", "0", "--model", "nobody/nothing", environment=environment) as process:
        assert process.wait(60) == 1
        errors = [line for line in process.lines if re.search(r"error|ERROR|Traceback|Error", line)]
        assert len(errors) == 1, process.output
        assert errors[0].startswith(
            "error: worker 1 cannot start: 'nobody/nothing' is no directory, and no model of that id could be fetched: "
        )
