"""A worker with the reference's names, for `test_dynamo_names.py`: runs unchanged under `dynamo` and under `stator.dynamo` (`NAMES`)."""

import asyncio
import functools
import importlib
import json
import os

from pydantic import BaseModel

NAMES = os.environ["NAMES"]
names = importlib.import_module(f"{NAMES}.runtime")
llm = importlib.import_module(f"{NAMES}.llm")
exceptions = importlib.import_module(f"{NAMES}.llm.exceptions")

ended = {}
endpoints = {}


class Question(BaseModel):
    text: str


async def generate(request, context):
    mode = request["mode"]
    state = ended[context.id()] = {"items": 0, "end": "running"}
    try:
        async for item in items(mode, request, context):
            yield item
            state["items"] += 1
        state["end"] = "complete"
    except BaseException as error:
        state["end"] = type(error).__name__
        raise
    finally:
        state["stopped"] = context.is_stopped()


async def items(mode, request, context):
    if mode == "count":
        for number in range(request["n"]):
            yield {"number": number}
    elif mode == "odd values":
        for value in (None, (1, 2), float("nan"), {"data": 1, "event": "no"}, "text", 2.5):
            yield value
    elif mode == "nothing":
        return
    elif mode == "facts":
        yield {"id": context.id(), "metadata": dict(context.metadata), "trace": context.trace_headers()}
    elif mode == "raise":
        for number in range(request["after"]):
            yield number
        raise {"ValueError": ValueError, "KeyError": KeyError, "TimeoutError": TimeoutError}[request["kind"]]("boom")
    elif mode == "raise typed":
        raise getattr(exceptions, request["kind"])("typed boom")
    elif mode == "http error":
        raise llm.HttpError(422, "not like this")
    elif mode == "generator exit":
        raise GeneratorExit
    elif mode == "until stopped":
        number = 0
        while not context.is_stopped():
            yield number
            number += 1
            await asyncio.sleep(0.005)
    elif mode == "slow":
        for number in range(request["n"]):
            yield number
            await asyncio.sleep(0.05)


async def without_context(request):
    yield "without"


async def keyword_context(request, *, context):
    yield [type(context).__name__, context.id()]


async def other_name(request, other="default"):
    yield other


async def missing(request, other):
    yield other


async def coroutine(request):
    return 1


def synchronous(request):
    yield 1


class Numbers:
    def __init__(self, request):
        self.left = request

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return self.left


@names.dynamo_endpoint(Question, Question)
async def validated(request):
    yield request.text


HANDLERS = {
    "generate": generate,
    "without": without_context,
    "keyword": keyword_context,
    "other": other_name,
    "missing": missing,
    "coroutine": coroutine,
    "synchronous": synchronous,
    "iterator": Numbers,
    "partial": functools.partial(other_name, other="bound"),
    "validated": validated,
}


def path(name):
    return f"names.{os.environ['COMPONENT']}.{name}_h"


async def refusals(runtime):
    """What serving with bad arguments raises."""
    found = {}
    for case, arguments in {
        "label that is no text": {"metrics_labels": [("a", 1)]},
        "labels in a dict": {"metrics_labels": {"a": "b"}},
        "automatic label": {"metrics_labels": [("worker_id", "x")]},
        "label name": {"metrics_labels": [("9-bad", "x")]},
        "label twice": {"metrics_labels": [("a", "x"), ("a", "y")]},
        "payload that is no dict": {"health_check_payload": 3},
        "payload without JSON": {"health_check_payload": {"a": object()}},
    }.items():
        try:
            await asyncio.wait_for(runtime.endpoint(path("refused")).serve_endpoint(without_context, **arguments), 5)
        except TypeError:
            found[case] = "TypeError"
        except Exception as error:
            found[case] = f"Exception: {error}"
    return found


def routes(runtime):
    """What may be registered before anything is served."""

    async def route(body):
        return body

    endpoint = runtime.endpoint(path("generate"))
    endpoint.metrics.register_prometheus_expfmt_callback(lambda: "names_total 1")
    return [runtime.register_engine_route("control/echo", route), runtime.set_health_status(True)]


async def admin(request):
    """Commands of the test."""
    if request["do"] == "journal":
        yield ended.get(request["id"])
    elif request["do"] == "leave":
        await endpoints["without"].unregister_endpoint_instance()
        try:
            await endpoints["without"].unregister_endpoint_instance()
            yield "left twice"
        except Exception:
            yield "left once"
    elif request["do"] == "enter":
        await endpoints["without"].register_endpoint_instance()
        yield "entered"
    elif request["do"] == "connection":
        yield [endpoints["generate"].connection_id(), endpoints["without"].connection_id()]
    elif request["do"] == "shutdown":
        asyncio.get_running_loop().call_later(0.2, endpoints["runtime"].shutdown)
        yield "shutting down"


@names.dynamo_worker()
async def main(runtime):
    facts = {"refusals": await refusals(runtime), "registered": routes(runtime)}
    handlers = {**HANDLERS, "admin": admin}
    endpoints.update({name: runtime.endpoint(path(name)) for name in handlers}, runtime=runtime)
    serving = [
        asyncio.ensure_future(endpoints[name].serve_endpoint(handler, metrics_labels=[("test", name)]))
        for name, handler in handlers.items()
    ]
    print(json.dumps({"ready": True, **facts}), flush=True)
    await asyncio.gather(*serving)
    print(json.dumps({"returned": True}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
