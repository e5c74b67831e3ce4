"""Load on an OpenAI-compatible endpoint: chat completions streamed over kept-alive connections, one request in flight on each.

One thread, one epoll, plain sockets: while the clock runs, a readable event costs one `recv`, and what was received is only
kept, so that little CPU is taken from the server under test. Afterwards every answer is parsed and compared with the expected
text. Prints one JSON object; with `--process NAME=GROUP` it has the CPU per token of those process groups.
"""

import argparse
import json
import re
import resource
import select
import socket
import sys
import time
from collections import deque

import msgspec

from benchmarks.children import group_cpu_seconds
from benchmarks.measures import WrongAnswer, quantile

__all__ = ["Answer", "check_answer"]

_LAST_CHUNK = b"\r\n0\r\n\r\n"
_CONTENT = re.compile(rb'"content": ?"[^"]')
_DATA = re.compile(rb"^data: (.*?)\r?$", re.MULTILINE)
_SILENCE_LIMIT = 30.0


class Answer:
    """One request on its way and what came back for it. Times are readings of `perf_counter`."""

    __slots__ = ("began", "chunks", "ended", "first", "tail")

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first = 0.0
        """when the first text arrived; a delta with the role alone does not count"""
        self.ended = 0.0
        self.chunks: list[bytes] = []
        self.tail = b""

    def receive(self, data: bytes) -> bool:
        """Keep what arrived; True when the answer is complete."""
        now = time.perf_counter()
        if not self.first and _CONTENT.search(data):
            self.first = now
        self.chunks.append(data)
        self.tail = (self.tail + data[-len(_LAST_CHUNK) :])[-len(_LAST_CHUNK) :]
        self.ended = now
        return self.tail == _LAST_CHUNK


class Load:
    """The connections, and rounds of requests over them."""

    def __init__(self, *, port: int, body: bytes, connections: int) -> None:
        self._request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        ).encode() + body
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._open: dict[int, Answer] = {}
        for _ in range(connections):
            connection = socket.create_connection(("127.0.0.1", port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets[connection.fileno()] = connection
            self._poll.register(connection.fileno(), select.EPOLLIN)

    def run(self, *, requests: int = 0, seconds: float = 0.0) -> list[Answer]:
        """`requests` requests, or as many as begin within `seconds`, on all connections; returns the complete answers."""
        until, answers = time.perf_counter() + seconds, list[Answer]()
        idle = deque(self._sockets)
        left = requests if requests else sys.maxsize
        while True:
            while idle and left and (requests or time.perf_counter() < until):
                self._start(idle.popleft())
                left -= 1
            if not self._open:
                return answers
            events = self._poll.poll(_SILENCE_LIMIT)
            if not events:
                raise WrongAnswer(f"{len(self._open)} streams silent for {_SILENCE_LIMIT:g} s")
            for descriptor, _ in events:
                data = self._sockets[descriptor].recv(1 << 18)
                answer = self._open.get(descriptor)
                if not data or answer is None:
                    raise WrongAnswer("the server closed a kept-alive connection" if not data else "bytes nobody asked for")
                if answer.receive(data):
                    answers.append(self._open.pop(descriptor))
                    idle.append(descriptor)
                elif not answer.chunks[0].startswith(b"HTTP/1.1 200"):
                    raise WrongAnswer(f"the server answered {answer.chunks[0][:300]!r}")

    def _start(self, descriptor: int) -> None:
        self._open[descriptor] = Answer()
        self._sockets[descriptor].sendall(self._request)


def check_answer(raw: bytes, expected: str) -> int:
    """Compare a whole HTTP answer with the expected text; returns how many SSE events brought text.

    Raises `WrongAnswer` unless it is a 200 with exactly that text, the finish reason `length` and `[DONE]` at the end.
    """
    head, _, chunked = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200"):
        raise WrongAnswer(f"the server answered {raw[:300]!r}")
    events = _DATA.findall(_dechunk(chunked))
    if not events or events[-1] != b"[DONE]":
        raise WrongAnswer("the stream does not end with [DONE]")
    texts, reason = list[str](), None
    for event in events[:-1]:
        for choice in msgspec.json.decode(event)["choices"]:
            texts.append(choice["delta"].get("content") or "")
            reason = choice.get("finish_reason") or reason
    if reason != "length" or "".join(texts) != expected:
        raise WrongAnswer(f"finish reason {reason!r}, {len(''.join(texts))} characters instead of {len(expected)}")
    return sum(bool(text) for text in texts)


def _dechunk(data: bytes) -> bytes:
    """The body of a chunked answer."""
    parts, at = [], 0
    while True:
        end = data.index(b"\r\n", at)
        size = int(data[at:end].partition(b";")[0], 16)
        if size == 0:
            return b"".join(parts)
        parts.append(data[end + 2 : end + 2 + size])
        at = end + 2 + size + 2


def main(arguments: list[str]) -> None:
    options = _parser().parse_args(arguments)
    content = [{"role": "user", "content": "hello world"}]
    body = {"model": options.model, "max_tokens": options.max_tokens, "stream": True, "messages": content}
    load = Load(port=options.port, body=json.dumps(body).encode(), connections=options.concurrency)
    groups = {name: int(group) for name, _, group in (text.partition("=") for text in options.process)}
    load.run(requests=options.concurrency * options.warmup)
    before, own = {name: group_cpu_seconds(group) for name, group in groups.items()}, _own_cpu()
    began = time.perf_counter()
    answers = load.run(requests=options.requests, seconds=options.seconds)
    elapsed = max(answer.ended for answer in answers) - began
    after, own = {name: group_cpu_seconds(group) for name, group in groups.items()}, _own_cpu() - own
    events = sum(check_answer(b"".join(answer.chunks), options.expect) for answer in answers)
    tokens = len(answers) * options.max_tokens
    cpu = {f"{name}_us": (after[name] - before[name]) / tokens * 1e6 for name in groups}
    print(
        json.dumps(
            {
                "requests": len(answers),
                "tokens_per_s": tokens / elapsed,
                **_milliseconds("ttft", [answer.first - answer.began for answer in answers]),
                **_milliseconds("answer", [answer.ended - answer.began for answer in answers]),
                "us_per_token": sum(cpu.values()),
                **cpu,
                "load_us": own / tokens * 1e6,
                "events_per_answer": events / len(answers),
                "reads_per_answer": sum(len(answer.chunks) for answer in answers) / len(answers),
            }
        ),
        flush=True,
    )


def _milliseconds(name: str, times: list[float]) -> dict[str, float]:
    times.sort()
    return {f"{name}_p50_ms": quantile(times, 0.5) * 1e3, f"{name}_p99_ms": quantile(times, 0.99) * 1e3}


def _own_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sse_load", description=__doc__)
    parser.add_argument("--port", type=int, required=True, help="of the server on 127.0.0.1")
    parser.add_argument("--model", required=True)
    parser.add_argument("--expect", required=True, help="the text of a right answer")
    parser.add_argument("--concurrency", type=int, default=64, help="connections, with one request in flight on each")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--warmup", type=int, default=1, help="requests per connection before the clock runs")
    parser.add_argument("--process", action="append", default=[], metavar="NAME=GROUP", help="process group to account")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--requests", type=int, default=0)
    length.add_argument("--seconds", type=float, default=0.0)
    return parser


if __name__ == "__main__":
    main(sys.argv[1:])
