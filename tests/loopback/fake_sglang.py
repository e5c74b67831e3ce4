"""A stand-in for SGLang with the names and signatures of its public interface (0.5.23): what our adapter touches, and no more.

Tokens are those of `fake_foreign`. A step takes a millisecond. `install` puts it into `sys.modules`.
"""

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from loopback.fake_foreign import EOS, STEP, PrefixCache, install_modules, load_for, next_token

CAPACITY = 16_000
"""tokens of one rank's cache"""


@dataclasses.dataclass
class ServerArgs:
    model_path: str
    skip_tokenizer_init: bool = False
    dtype: str = "auto"
    tp_size: int = 1
    dp_size: int = 1
    mem_fraction_static: float | None = None
    context_length: int | None = None
    max_running_requests: int | None = None
    max_prefill_tokens: int = 4096
    page_size: int | None = None
    incremental_streaming_output: bool = False
    kv_events_config: str | None = None
    enable_metrics: bool = False
    log_level: str = "info"


@dataclasses.dataclass
class OldServerArgs(ServerArgs):
    """Of versions before the streaming option was renamed."""

    stream_output: bool = False


@dataclasses.dataclass
class LoadSnapshot:
    dp_rank: int = 0
    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_used_tokens: int = 0
    cache_hit_rate: float = 0.0


class HTTPException(Exception):
    def __init__(self, status_code: int, detail: str):
        super().__init__(detail)
        self.status_code, self.detail = status_code, detail


class Request:
    def __init__(self, rid: str, ids: list[int], params: dict[str, Any], rank: int, *, logprobs: int | None) -> None:
        self.rid, self.ids, self.params, self.rank, self.logprobs = rid, ids, params, rank, logprobs
        self.output_ids: list[int] = []
        self.token_logprobs: list[Any] = []
        self.top_logprobs: list[Any] = []
        self.hit = 0
        self.chunks: list[dict[str, Any]] = []
        self.event = asyncio.Event()
        self.finished = False


class TokenizerManager:
    def __init__(self, args: ServerArgs) -> None:
        self.server_args = args
        self.context_len = args.context_length or 16_384
        self.model_config = SimpleNamespace(get_default_sampling_params=lambda: {"temperature": 0.6, "top_k": 20})
        self.rid_to_state: dict[str, Request] = {}
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.aborted: list[str] = []
        self.event_loop: asyncio.AbstractEventLoop | None = None
        self.handle: asyncio.Task[None] | None = None
        self.caches = [self._cache(rank) for rank in range(args.dp_size)]
        self.broken_loads = False

    @property
    def page_size(self) -> int:
        return self.server_args.page_size or 1

    def auto_create_handle_loop(self) -> None:
        if self.event_loop is None:
            self.event_loop = asyncio.get_running_loop()
            self.handle = self.event_loop.create_task(self._run())

    async def get_internal_state(self) -> list[dict[str, Any]]:
        self.auto_create_handle_loop()
        state = {
            "page_size": self.page_size,
            "max_prefill_tokens": self.server_args.max_prefill_tokens,
            "max_running_requests": self.server_args.max_running_requests,
            "effective_max_running_requests_per_dp": self.server_args.max_running_requests or 4,
            "memory_usage": {"token_capacity": CAPACITY},
        }
        return [state for _ in range(self.server_args.dp_size)]

    async def get_loads(self, include: list[str] | None = None, dp_rank: int | None = None) -> list[LoadSnapshot]:
        if self.broken_loads:
            raise RuntimeError("no load today")
        loads: list[LoadSnapshot] = []
        for rank in range(self.server_args.dp_size):
            used = sum(len(each.ids) + len(each.output_ids) for each in self.running if each.rank == rank)
            loads.append(LoadSnapshot(dp_rank=rank, num_used_tokens=used, cache_hit_rate=0.25))
        return loads

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        self.aborted.append(rid)
        request = self.rid_to_state.get(rid)
        if request is not None:
            self._finish(request, {"type": "abort", "message": "Aborted", "status_code": None, "err_type": None})

    async def generate_request(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        self.auto_create_handle_loop()
        if request.rid in self.rid_to_state:
            raise ValueError(f"Duplicate request ID detected: {request.rid}")
        total = len(request.ids) + (request.params.get("max_new_tokens") or 0)
        if total > self.context_len:
            raise ValueError(f"Requested token count exceeds the model's maximum context length of {self.context_len} tokens.")
        if request.params.get("temperature", 1.0) < 0:
            raise ValueError("temperature must be non-negative, got -1.0.")
        if request.ids[0] == 499:
            raise {1: ValueError("this prompt"), 2: RuntimeError("this prompt"), 3: HTTPException(503, "overloaded")}[
                request.ids[1]
            ]
        self.rid_to_state[request.rid] = request
        self.waiting.append(request)
        incremental = self.server_args.incremental_streaming_output or getattr(self.server_args, "stream_output", False)
        try:
            while True:
                await request.event.wait()
                chunks, request.chunks = request.chunks, []
                finished = request.finished
                request.event.clear()
                if incremental:
                    yield {
                        **chunks[-1],
                        "output_ids": [token for chunk in chunks for token in chunk["output_ids"]],
                        "meta_info": {
                            **chunks[-1]["meta_info"],
                            **{
                                name: [entry for chunk in chunks for entry in chunk["meta_info"][name]]
                                for name in ("output_token_logprobs", "output_top_logprobs")
                                if name in chunks[-1]["meta_info"]
                            },
                        },
                    }
                else:
                    yield chunks[-1]
                if finished:
                    return
        finally:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self.rid_to_state.pop(request.rid, None)
        for queue in (self.running, self.waiting):
            if request in queue:
                queue.remove(request)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(STEP)
            for request in self.waiting[: (self.server_args.max_running_requests or 4) - len(self.running)]:
                self.waiting.remove(request)
                self.running.append(request)
                _, request.hit = self.caches[request.rank].look_up(request.ids)
            for request in tuple(self.running):
                self._decode(request)

    def _cache(self, rank: int) -> PrefixCache:
        told = self.server_args.kv_events_config
        config = None if told is None else json.loads(told)
        assert config is None or config["publisher"] == "zmq"
        return PrefixCache(rank, block_size=self.page_size, endpoint=config and config["endpoint"])

    def _decode(self, request: Request) -> None:
        if request.ids[0] == 498:
            code = {1: HTTPStatus.BAD_REQUEST, 2: HTTPStatus.INTERNAL_SERVER_ERROR, 3: HTTPStatus.SERVICE_UNAVAILABLE}
            self._finish(request, {"type": "abort", "message": "this prompt", "status_code": code[request.ids[1]]})
            return
        params = request.params
        token = next_token(request.ids, len(request.output_ids))
        request.output_ids.append(token)
        if request.logprobs is not None:
            request.token_logprobs.append((-1.0, token, None))
            if request.logprobs:
                request.top_logprobs.append([(-0.5, token + 1, None), (-1.0, token, None)][: request.logprobs])
        finish: dict[str, Any] | None = None
        if (token == EOS and not params.get("ignore_eos")) or token in (params.get("stop_token_ids") or ()):
            finish = {"type": "stop", "matched": token}
        elif len(request.output_ids) >= params.get("max_new_tokens", 128):
            finish = {"type": "length", "length": len(request.output_ids)}
        if finish is not None:
            self._finish(request, finish, new=1)
        else:
            self._emit(request, None, new=1)

    def _finish(self, request: Request, finish: dict[str, Any], *, new: int = 0) -> None:
        request.finished = True
        self._emit(request, finish, new=new)
        self._forget(request)

    def _emit(self, request: Request, finish: dict[str, Any] | None, *, new: int) -> None:
        incremental = self.server_args.incremental_streaming_output or getattr(self.server_args, "stream_output", False)
        start = len(request.output_ids) - new if incremental else 0
        meta: dict[str, Any] = {
            "id": request.rid,
            "finish_reason": finish,
            "prompt_tokens": len(request.ids),
            "completion_tokens": len(request.output_ids),
            "cached_tokens": request.hit,
        }
        if request.logprobs is not None:
            meta["output_token_logprobs"] = request.token_logprobs[start:]
            if request.logprobs:
                meta["output_top_logprobs"] = request.top_logprobs[start:]
        ids = request.output_ids[start:] if incremental else request.output_ids  # the list itself, which goes on growing
        chunk: dict[str, Any] = {"output_ids": ids, "meta_info": meta}
        if not self.server_args.skip_tokenizer_init:
            chunk["text"] = "…"
        request.chunks.append(chunk)
        request.event.set()


class Engine:
    last: "Engine"
    """the one made last"""
    server_args_class: type[ServerArgs] = ServerArgs

    def __init__(self, **kwargs: Any) -> None:
        Engine.last = self
        self.is_shut_down = False
        self.server_args = self.server_args_class(**kwargs)
        if self.server_args.model_path.endswith("-that-fails"):
            raise RuntimeError("Initialization failed. Please see the error messages above.")
        load_for(50)
        self.tokenizer_manager = TokenizerManager(self.server_args)
        self.loop = asyncio.get_running_loop()

    async def async_generate(
        self,
        prompt: Any = None,
        sampling_params: dict[str, Any] | None = None,
        input_ids: list[int] | None = None,
        image_data: Any = None,
        return_logprob: bool = False,
        logprob_start_len: int | None = None,
        top_logprobs_num: int | None = None,
        stream: bool = False,
        routed_dp_rank: int | None = None,
        data_parallel_rank: int | None = None,
        rid: str | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        assert stream and input_ids and rid and sampling_params is not None
        assert data_parallel_rank is None, "deprecated"
        rank = routed_dp_rank or 0
        if not 0 <= rank < self.server_args.dp_size:
            raise ValueError(f"routed_dp_rank={rank} out of range [0, {self.server_args.dp_size})")
        logprobs = (top_logprobs_num or 0) if return_logprob else None
        request = Request(rid, input_ids, sampling_params, rank, logprobs=logprobs)
        return self.tokenizer_manager.generate_request(request)

    def shutdown(self) -> None:
        self.is_shut_down = True
        for cache in self.tokenizer_manager.caches:
            cache.close()


class OldEngine(Engine):
    """Of versions before the streaming option and the choice of a rank were renamed."""

    server_args_class = OldServerArgs

    async def async_generate(  # type: ignore[override]
        self,
        sampling_params: dict[str, Any] | None = None,
        input_ids: list[int] | None = None,
        stream: bool = False,
        data_parallel_rank: int | None = None,
        rid: str | None = None,
    ) -> AsyncIterator[dict[str, Any]]:
        return await Engine.async_generate(
            self, None, sampling_params, input_ids, stream=stream, routed_dp_rank=data_parallel_rank, rid=rid
        )


def install(monkeypatch: pytest.MonkeyPatch, *, old: bool = False) -> None:
    """Put the stand-in where imports find it."""
    contents: dict[str, dict[str, Any]] = {
        "sglang": {},
        "sglang.srt": {},
        "sglang.srt.entrypoints": {},
        "sglang.srt.entrypoints.engine": {"Engine": OldEngine if old else Engine},
        "sglang.srt.server_args": {"ServerArgs": old_arguments() if old else ServerArgs},
    }
    install_modules(monkeypatch, contents)


def old_arguments() -> Any:
    """`OldServerArgs`, by a signature without the new name."""

    def make(
        model_path: str,
        skip_tokenizer_init: bool = False,
        dtype: str = "auto",
        tp_size: int = 1,
        dp_size: int = 1,
        page_size: int | None = None,
        kv_events_config: str | None = None,
        stream_output: bool = False,
    ) -> None:
        raise NotImplementedError

    return make
