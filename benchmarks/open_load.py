"""Requests that come at random moments whether or not others have ended: streamed completions of a simulated model.

One thread, plain sockets, one poll: a readable event costs one `recv` and a look for the first text. Prints one JSON object.
"""

import argparse
import json
import random
import re
import select
import socket
import sys
import time
from collections import deque

from benchmarks.measures import WrongAnswer, quantile

_TEXT = re.compile(rb'"text": ?"[^"]')
_LAST_CHUNK = b"\r\n0\r\n\r\n"
_DONE = b"data: [DONE]"
_MOST_SILENCE = 30.0
_PROMPT, _ANSWER = (256, 768), (32, 96)
"""tokens, at random between these; the byte tokenizer makes one of each character"""


class _Request:
    __slots__ = ("began", "first", "refused", "tail")

    def __init__(self, began: float) -> None:
        self.began = began
        self.first = 0.0
        self.refused = False
        self.tail = b""


class OpenLoad:
    """`rate` requests a second for `seconds`, after `warmup` seconds of the same that do not count."""

    def __init__(self, port: int, model: str, *, rate: float, seconds: float, warmup: float, seed: int) -> None:
        self._port = port
        self._model = model
        self._rate = rate
        self._warmup = warmup
        self._length = warmup + seconds
        self._seconds = seconds
        self._random = random.Random(seed)
        self._poll = select.epoll()
        self._sockets: dict[int, socket.socket] = {}
        self._idle: deque[int] = deque()
        self._open: dict[int, _Request] = {}
        self._number = 0
        self.ttft: list[float] = []
        self.refusals: list[float] = []
        self.done = 0

    def run(self) -> dict[str, float]:
        """All requests, to their ends."""
        cpu = time.process_time()
        began = due = time.perf_counter()
        due += self._random.expovariate(self._rate)
        while True:
            now = time.perf_counter()
            while due <= now and due < began + self._length:
                self._send(due)
                due += self._random.expovariate(self._rate)
            coming = due < began + self._length
            if not coming and not self._open:
                break
            ready = self._poll.poll(max(0.0, due - now) if coming else _MOST_SILENCE)
            if not ready and not coming:
                raise WrongAnswer(f"{len(self._open)} requests silent for {_MOST_SILENCE:g} s")
            for descriptor, _ in ready:
                self._receive(descriptor, began)
        elapsed = time.perf_counter() - began
        self.ttft.sort()
        self.refusals.sort()
        result = {
            "taken": len(self.ttft),
            "refused": len(self.refusals),
            "done_per_s": self.done / self._seconds,
            "ttft_p50_ms": quantile(self.ttft, 0.5) * 1e3,
            "ttft_p99_ms": quantile(self.ttft, 0.99) * 1e3,
            "load_core": (time.process_time() - cpu) / elapsed,
        }
        if self.refusals:
            result["refusal_p50_ms"] = quantile(self.refusals, 0.5) * 1e3
            result["refusal_p99_ms"] = quantile(self.refusals, 0.99) * 1e3
        return result

    def _send(self, due: float) -> None:
        """Its clock runs from when it should be sent."""
        self._number += 1
        prompt = f"{self._random.getrandbits(48):012x}".ljust(self._random.randint(*_PROMPT), "x")
        body = json.dumps(
            {"model": self._model, "prompt": prompt, "max_tokens": self._random.randint(*_ANSWER), "stream": True}
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        descriptor = self._idle.pop() if self._idle else self._connect()
        self._open[descriptor] = _Request(due)
        self._sockets[descriptor].sendall(head.encode() + body)

    def _connect(self) -> int:
        connection = socket.create_connection(("127.0.0.1", self._port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sockets[connection.fileno()] = connection
        self._poll.register(connection.fileno(), select.EPOLLIN)
        return connection.fileno()

    def _receive(self, descriptor: int, began: float) -> None:
        data = self._sockets[descriptor].recv(1 << 18)
        request = self._open.get(descriptor)
        if not data or request is None:
            raise WrongAnswer("the server closed a kept-alive connection" if not data else "bytes nobody asked for")
        now = time.perf_counter()
        if not request.tail:
            status = data[9:12]
            if status not in (b"200", b"503"):
                raise WrongAnswer(f"the server answered {data[:300]!r}")
            request.refused = status == b"503"
        if not request.first and _TEXT.search(data):
            request.first = now
        request.tail = (request.tail + data)[-64:]
        if request.refused:
            if not data.rstrip().endswith(b"}"):
                return
        elif not request.tail.endswith(_LAST_CHUNK):
            return
        del self._open[descriptor]
        self._idle.append(descriptor)
        self._count(request, began, now)

    def _count(self, request: _Request, began: float, now: float) -> None:
        if not request.refused and (not request.first or _DONE not in request.tail):
            raise WrongAnswer("an answer has no text or no end")
        came, ended = request.began - began, now - began
        if not request.refused and self._warmup <= ended < self._length:
            self.done += 1
        if self._warmup <= came:
            (self.refusals if request.refused else self.ttft).append(
                (now if request.refused else request.first) - request.began
            )


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", required=True)
    for name in ("rate", "seconds", "warmup"):
        parser.add_argument(f"--{name}", type=float, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    load = OpenLoad(
        options.port, options.model, rate=options.rate, seconds=options.seconds, warmup=options.warmup, seed=options.seed
    )
    try:
        print(json.dumps(load.run()), flush=True)
    except WrongAnswer as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
