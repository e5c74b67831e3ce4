"""Model cards and requests against the reference 1.3.1: same card for the same directory, same checksum for the same card,
same request for the same OpenAI body.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest

from interop.peers import REFERENCE, needs_reference
from stator.llm.card import ModelCard, RuntimeConfig, WorkerType, byte_card, card_from_directory, card_to_json, mdcsum
from stator.llm.openai import parse_chat, parse_completion
from stator.llm.preprocess import Preprocessor
from stator.llm.request import encode_request
from stator.protocol.records import ModelRecord, encode_record
from stator.testing.manual_clock import ManualClock
from stator.testing.tiny_tokenizers import build_model_directory

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_reference]

WAIT = 40.0
"""seconds until a process of the reference has done what it should"""

# Registers the models listed on its standard input; a served one notes its requests in a file and answers with one token.
WORKER = """
import asyncio, json, os, sys
from dynamo.llm import ModelInput, ModelRuntimeConfig, ModelType, WorkerType, register_model
from dynamo.runtime import DistributedRuntime

async def main():
    runtime = DistributedRuntime(asyncio.get_running_loop(), "file", "tcp", event_plane="zmq")
    models = json.load(sys.stdin)
    serving = []
    for place, model in enumerate(models):
        endpoint = runtime.endpoint(f"demo.c{place}.generate{place}")
        config = ModelRuntimeConfig()
        for name, value in model.get("runtime", {}).items():
            setattr(config, name, value)
        needs = [[getattr(WorkerType, name) for name in each] for each in model.get("needs", [])]
        await register_model(
            ModelInput.Tokens, ModelType.Chat | ModelType.Completions, endpoint, model["path"], model["name"],
            kv_cache_block_size=16, runtime_config=config, custom_template_path=model.get("template"),
            worker_type=getattr(WorkerType, model.get("worker", "Aggregated")), needs=needs or None,
            user_data=model.get("user_data"),
        )
        if "capture" in model:
            out = open(model["capture"], "a")
            async def generate(request, context, out=out):
                out.write(json.dumps(request) + "\\n")
                out.flush()
                yield {"token_ids": [97], "finish_reason": "length"}
            serving.append(asyncio.ensure_future(endpoint.serve_endpoint(generate)))
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def wait_for(found: Callable[[], Any], what: str) -> Any:
    """Ask until the answer is true; the wait is bounded."""
    deadline = time.monotonic() + WAIT
    while time.monotonic() < deadline:
        if answer := found():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"waited {WAIT} s for {what}")


def reference_environment(tmp_path: Path) -> dict[str, str]:
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("DYN_", "STATOR_"))},
        "HOME": str(tmp_path),
        "DYN_DISCOVERY_BACKEND": "file",
        "DYN_FILE_KV": str(tmp_path / "kv"),
        "DYN_REQUEST_PLANE": "tcp",
        "DYN_EVENT_PLANE": "zmq",
        "DYN_TCP_RPC_HOST": "127.0.0.1",
        "DYN_TCP_RESPONSE_STREAM_HOST": "lo",
        "DYN_LOG": "error",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def running(tmp_path: Path, *arguments: str, given: Any = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process of the reference; `given` goes to its standard input as JSON. Ended with the block."""
    log = (tmp_path / "log.txt").open("ab")
    process = subprocess.Popen(
        [str(REFERENCE), *arguments],
        env=reference_environment(tmp_path),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
    )
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(given).encode())
        process.stdin.close()
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
        log.close()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def frontend(tmp_path: Path) -> Iterator[str]:
    """A frontend of the reference; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with running(tmp_path, "-m", "dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)):
        yield f"http://127.0.0.1:{port}"


def read_cards(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """The cards in the reference's file discovery, by name."""
    found = [json.loads(path.read_text()) for path in (tmp_path / "kv/v1/mdc").glob("[!.]*")]
    return {record["card_json"]["display_name"]: record["card_json"] for record in found}


def test_the_same_directory_gives_the_same_card(tmp_path: Path) -> None:
    plain = build_model_directory(tmp_path / "plain")
    bare = build_model_directory(tmp_path / "bare", tokenizer_config=None, generation_config=None)
    nested = build_model_directory(tmp_path / "nested", config={"text_config": {"max_position_embeddings": 77}})
    jinja = build_model_directory(tmp_path / "jinja", tokenizer_config={"model_max_length": 10**30})
    (jinja / "chat_template.jinja").write_text("{{ messages[0].content }}")
    wrapped = build_model_directory(tmp_path / "wrapped")
    (wrapped / "chat_template.json").write_text('{"chat_template": "x"}')
    custom = tmp_path / "custom.jinja"
    custom.write_text("{{ messages[0].content }}!")
    runtime = {"total_kv_blocks": 100, "max_num_seqs": 7, "tool_call_parser": "hermes"}
    cases: list[tuple[dict[str, Any], ModelCard]] = [
        ({"path": str(path), "name": path.name}, card_from_directory(path, name=path.name))
        for path in (plain, bare, nested, jinja, wrapped)
    ]
    cases += [
        (
            {"path": str(plain), "name": "My/Custom 1", "template": str(custom), "user_data": {"a": [1]}},
            card_from_directory(plain, name="My/Custom 1", chat_template=custom, user_data={"a": [1]}),
        ),
        (
            {"path": str(plain), "name": "decode", "worker": "Decode", "needs": [["Prefill"]], "runtime": runtime},
            card_from_directory(
                plain,
                name="decode",
                worker_type=WorkerType.DECODE,
                needs=[[WorkerType.PREFILL]],
                runtime_config=RuntimeConfig(**runtime),
            ),
        ),
    ]
    with running(tmp_path, "-c", WORKER, given=[model for model, _ in cases]) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        cards = read_cards(tmp_path)
    for _, ours in cases:
        # Compared as text: the order of the keys counts too.
        assert json.dumps(cards[ours.display_name]) == json.dumps(card_to_json(ours))


def test_a_frontend_of_the_reference_reads_our_cards_and_computes_the_same_checksum(tmp_path: Path) -> None:
    plain = build_model_directory(tmp_path / "plain")
    cards = [
        byte_card("echo", context_length=500),
        card_from_directory(plain, name="plain"),
        card_from_directory(
            plain,
            name="decode",
            kv_cache_block_size=32,
            worker_type=WorkerType.DECODE,
            needs=[[WorkerType.PREFILL], [WorkerType.AGGREGATED, WorkerType.ENCODE]],
            runtime_config=RuntimeConfig(context_length=99),
        ),
    ]
    bucket = tmp_path / "kv/v1/mdc"
    bucket.mkdir(parents=True)
    for place, card in enumerate(cards):
        record = ModelRecord(
            namespace="demo", component=f"c{place}", endpoint="generate", instance_id=7, card_json=card_to_json(card)
        )
        (bucket / quote(record.key.path, safe="")).write_bytes(encode_record(record))
    expected = {f"{card.display_name}/{mdcsum(card)}" for card in cards}
    seen = tmp_path / ".cache/dynamo/mdc/by-slug"

    def computed() -> bool:
        for file in bucket.iterdir():
            os.utime(file)  # records nobody refreshes are removed after 10 s
        return {f"{path.parent.name}/{path.name}" for path in seen.glob("*/*")} == expected

    with frontend(tmp_path):
        wait_for(computed, f"the checksums {expected}")


CHAT: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "hé 🎉"}]},
    {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "assistant", "content": "c"},
            {"role": "user", "content": "d"},
        ],
        "max_tokens": 5,
        "max_completion_tokens": 6,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.5,
        "top_k": 4,
        "min_p": 0.125,
        "seed": 7,
        "stop": ["x", "y"],
        "stop_token_ids": [3],
        "min_tokens": 1,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logprobs": True,
        "top_logprobs": 2,
    },
    {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "ignore_eos": True},
    {"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}},
    {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
        "tool_choice": "required",
    },
    {"messages": [{"role": "user", "content": "a"}], "guided_regex": "a+", "stop": [576]},
    {
        "messages": [{"role": "user", "content": "a"}],
        "nvext": {
            "annotations": ["x"],
            "agent_hints": {"priority": 3, "osl": 5},
            "cache_salt": "s",
            "extra_fields": ["timing"],
            "metadata_upload": {"url": "http://h/x"},
            "request_timestamp_ms": 1.5,
            "dp_rank": 0,
            "backend_instance_id": 5,
            "token_data": [5, 6],
        },
    },
]
COMPLETIONS: list[dict[str, Any]] = [
    {"prompt": "hé <|im_end|>", "max_tokens": 3, "logprobs": 2, "best_of": 2, "n": 1, "stop": "z"},
    {"prompt": [1, 2, 3], "nvext": {}},
]


def ask(url: str, path: str, body: dict[str, Any]) -> None:
    request = urllib.request.Request(f"{url}/v1/{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as response:
        assert response.status == 200


def test_the_same_body_gives_the_same_request(tmp_path: Path) -> None:
    """Both frontends send the same bytes to a worker, for a real model and for the byte tokenizer."""
    plain, bytes_ = build_model_directory(tmp_path / "plain"), byte_card("byte")
    config = bytes_.model_info.hf_config_json if bytes_.model_info else None
    assert config is not None
    models = [
        {"path": str(plain), "name": "plain", "capture": str(tmp_path / "plain.jsonl")},
        {"path": str(Path(config.path).parent), "name": "byte", "capture": str(tmp_path / "byte.jsonl")},
    ]
    with running(tmp_path, "-c", WORKER, given=models) as worker, frontend(tmp_path) as url:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"

        def listed() -> bool:
            try:
                with urllib.request.urlopen(f"{url}/v1/models", timeout=5) as response:
                    return len(json.load(response)["data"]) == 2
            except OSError:
                return False

        wait_for(listed, "both models")
        cards = read_cards(tmp_path)
        for model in models:
            for path, bodies in (("chat/completions", CHAT), ("completions", COMPLETIONS)):
                for body in bodies:
                    ask(url, path, {"model": model["name"], **body})
    for model in models:
        name = model["name"]
        ours = card_from_directory(model["path"], name=name)
        assert json.dumps(card_to_json(ours)) == json.dumps(cards[name])
        described = msgspec.structs.replace(
            bytes_, **{key: getattr(ours, key) for key in ("source_path", "runtime_config", "architectural_max_context_length")}
        )
        card = described if name == "byte" else ours
        preprocessor = Preprocessor.from_card(card, clock=ManualClock())
        chats = [parse_chat(msgspec.json.encode({"model": name, **body})) for body in CHAT]
        completions = [parse_completion(msgspec.json.encode({"model": name, **body})) for body in COMPLETIONS]
        requests = [preprocessor.chat(each) for each in chats]
        requests += [preprocessor.completion(each, each.prompts()[0]) for each in completions]
        theirs = Path(model["capture"]).read_text().splitlines()
        assert [json.dumps(json.loads(encode_request(each))) for each in requests] == theirs
