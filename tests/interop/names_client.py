"""A client with the reference's names, for `test_dynamo_names.py`: runs unchanged under `dynamo` and under `stator.dynamo` (`NAMES`).

Writes what it saw as one JSON object.
"""

import asyncio
import importlib
import json
import os
import sys

NAMES = os.environ["NAMES"]
names = importlib.import_module(f"{NAMES}.runtime")
Context = names.Context


def path(name):
    return f"names.{os.environ['COMPONENT']}.{name}_h"


def said(error):
    """Class and text as a program for the reference sees them."""
    for kind in (TypeError, OverflowError, ValueError, KeyError, RuntimeError, AttributeError):
        if isinstance(error, kind):
            return [kind.__name__, str(error)]
    return ["Exception", str(error)]


def outcome(function, *arguments):
    try:
        return function(*arguments)
    except Exception as error:
        return said(error)[0]


def told(item):
    return [item.data(), item.event(), item.comments(), item.id(), item.is_error()]


class Calls:
    def __init__(self, runtime):
        self.runtime = runtime
        self.clients = {}

    async def client(self, name):
        if name not in self.clients:
            self.clients[name] = client = await self.runtime.endpoint(path(name)).client()
            await asyncio.wait_for(client.wait_for_instances(), 20)
            await asyncio.sleep(0.2)  # a client of the reference that has seen an instance routes nowhere for a moment
        return self.clients[name]

    async def call(self, name, request, *, method="random", arguments=(), **options):
        """Items, and where and how it failed."""
        items, where = [], "call"
        try:
            stream = await getattr(await self.client(name), method)(request, *arguments, **options)
            where = "stream"
            async for item in stream:
                items.append(told(item) if options.get("annotated", True) else item)
        except Exception as error:
            return {"items": items, "failed": [where, *said(error)]}
        return {"items": items}

    async def again(self):
        """Wait until the worker is called again: some errors keep clients away from it for a while."""
        for _ in range(400):
            if "failed" not in await self.call("generate", {"mode": "nothing"}):
                return
            self.clients.pop("generate")
            await asyncio.sleep(0.05)

    async def admin(self, **command):
        return (await self.call("admin", command, annotated=False))["items"][0]

    async def journal(self, request_id):
        """How the handler of a request ended; it may still be running."""
        for _ in range(200):
            entry = await self.admin(do="journal", id=request_id)
            if entry is not None and "stopped" in entry:
                return entry
            await asyncio.sleep(0.05)
        return entry


async def ordinary(calls):
    count = {"mode": "count", "n": 3}
    return {
        "annotated": await calls.call("generate", count),
        "plain": await calls.call("generate", count, annotated=False),
        "annotated by None": await calls.call("generate", count, annotated=None),
        "by position": await calls.call("generate", {"mode": "nothing"}, arguments=(False,)),
        "odd values": await calls.call("generate", {"mode": "odd values"}),
        "odd values, plain": await calls.call("generate", {"mode": "odd values"}, annotated=False),
        "no items": await calls.call("generate", {"mode": "nothing"}),
        "many": len((await calls.call("generate", {"mode": "count", "n": 500}, annotated=False))["items"]),
        **{method: await calls.call("generate", count, method=method) for method in ("round_robin", "generate")},
    }


async def handlers(calls):
    found = {name: await calls.call(name, 2) for name in ("without", "other", "iterator", "partial")}
    found["keyword"] = await calls.call("keyword", 1, context=Context("named"))
    for name in ("missing", "coroutine", "synchronous"):
        found[name] = await calls.call(name, 1)
    found["validated"] = [await calls.call("validated", {"text": "a"}), await calls.call("validated", '{"text": "b"}')]
    for case, request in {"wrong field": {"tex": "a"}, "wrong type": 5}.items():
        answer = await calls.call("validated", request)
        answer["failed"][2] = answer["failed"][2].partition("1 validation error")[0]
        found[f"validated, {case}"] = answer
    return found


async def errors(calls):
    raised = {
        f"{kind} after {after}": await calls.call("generate", {"mode": "raise", "kind": kind, "after": after}, annotated=flag)
        for kind in ("ValueError", "KeyError", "TimeoutError")
        for after, flag in ((0, True), (3, False))
    }
    typed = [
        "DynamoException Unknown InvalidArgument CannotConnect Disconnected ConnectionTimeout Cancelled EngineShutdown",
        "StreamIncomplete RouterQueueLimitExceeded SelectionServiceError",
    ]
    for kind in " ".join(typed).split():
        raised[kind] = await calls.call("generate", {"mode": "raise typed", "kind": kind})
        await calls.again()
    raised["HttpError"] = await calls.call("generate", {"mode": "http error"})
    raised["GeneratorExit"] = await calls.call("generate", {"mode": "generator exit"})
    await calls.again()
    raised["not JSON"] = (await calls.call("generate", object()))["failed"][:2]
    raised["too large a number"] = (await calls.call("generate", {"n": 2**70}))["failed"][0]
    raised["no context"] = (await calls.call("generate", {}, context=3))["failed"][:2]
    stream = await (await calls.client("generate")).random({"mode": "raise", "kind": "KeyError", "after": 1})
    after = []
    for _ in range(4):
        try:
            after.append(told(await anext(stream))[0])
        except (Exception, StopAsyncIteration) as error:
            after.append(type(error).__name__ if isinstance(error, StopAsyncIteration) else said(error)[0])
    raised["after the end"] = after
    return raised


async def contexts(calls):
    found = {"facts": await calls.call("generate", {"mode": "facts"}, context=Context("fact-id", {"b": "2", "a": "1"}))}
    given = Context("two-calls")
    found["twice"] = [await calls.call("generate", {"mode": "count", "n": 1}, context=given) for _ in range(2)]
    context = Context("stopped")
    waiting = context.async_killed_or_stopped()
    stream, seen = await (await calls.client("generate")).random({"mode": "until stopped"}, context=context), 0
    async for _ in stream:
        seen += 1
        if seen == 3:
            context.stop_generating()
    journal = await calls.journal("stopped")
    found["stop"] = [
        seen >= 3,
        context.is_stopped(),
        context.is_killed(),
        await waiting,
        journal["stopped"],
        journal["end"] != "running",
    ]
    context = Context("stopped before")
    context.stop_generating()
    answer = await calls.call("generate", {"mode": "until stopped"}, context=context)
    found["stopped before"] = [answer.get("failed"), len(answer["items"]) < 50]
    stream = await (await calls.client("generate")).random({"mode": "until stopped"}, context=Context("dropped"))
    await anext(stream)
    del stream
    journal = await calls.journal("dropped")
    found["dropped"] = [journal["end"] != "running", journal["stopped"]]
    return found


def metadata():
    context = Context("q", {"a": "1", "c": "2", "b": "3"})
    view = context.metadata
    found = {
        "pairs": [view.items(), view.keys(), view.values(), list(view), len(view), "a" in view, repr(view)],
        "reads": [outcome(view.__getitem__, "z"), view.get("z"), view.get("z", "d"), outcome(view.get, "z", 5)],
        "writes": [outcome(view.__setitem__, "k", "v"), outcome(view.__setitem__, "k", 3), outcome(view.__setitem__, 3, "v")],
        "live": context.metadata.items(),
        "removes": [
            outcome(view.__delitem__, "z"),
            outcome(view.pop, "k"),
            outcome(view.pop, "k"),
            outcome(view.pop, "k", "d"),
            outcome(view.pop, "k", None),
            outcome(view.pop, "k", 4),
        ],
        "copy": view.copy(),
    }
    context.metadata = {"n": "1"}
    found["assigned"] = view.items()
    found["bad"] = [outcome(setattr, context, "metadata", value) for value in ({"n": 1}, None)]
    found["made"] = [outcome(lambda: Context("x", {"a": 1})), outcome(lambda: Context(3)), outcome(lambda: Context("").id())]
    found["new"] = [len(Context().id()), Context().id() != Context().id()]
    found["trace"] = [context.trace_id, context.span_id, context.parent_span_id, context.trace_headers()]
    with context.start_span("x", {"a": 1}) as span:
        found["span"] = [
            span.set_attribute("k", 1),
            span.add_event("e"),
            span.set_status("ok"),
            outcome(span.set_status, "zzz"),
        ]
    found["state"] = [context.is_stopped(), context.is_killed(), context.notify_first_token(), context.stop_generating()]
    found["stopped"] = [context.is_stopped(), context.is_killed()]
    return found


async def instances(calls):
    client = await calls.client("generate")
    ids = client.instance_ids()
    connections = await calls.admin(do="connection")
    found = {
        "ids": [len(ids), await client.wait_for_instances() == ids, connections == ids * 2],
        "direct": await calls.call("generate", {"mode": "count", "n": 1}, method="direct", arguments=(ids[0],)),
        "unknown": await calls.call("generate", {}, method="direct", arguments=(7,)),
        "no number": (await calls.call("generate", {}, method="direct", arguments=("7",)))["failed"][:2],
        "negative": (await calls.call("generate", {}, method="direct", arguments=(-7,)))["failed"][:2],
    }
    nobody = await calls.runtime.endpoint(path("nobody")).client()
    try:
        await nobody.random({})
    except Exception as error:
        found["nobody"] = said(error)
    found["nobody listed"] = nobody.instance_ids()
    try:
        await asyncio.wait_for(nobody.wait_for_instances(), 0.3)
    except TimeoutError:
        found["waiting for nobody"] = "waits"
    leaver = await calls.client("without")
    found["leave"] = await calls.admin(do="leave")
    found["left"] = await settled(lambda: not leaver.instance_ids())
    found["enter"] = await calls.admin(do="enter")
    found["entered"] = await settled(lambda: leaver.instance_ids() == ids)
    return found


async def settled(condition):
    """Whether `condition` came true."""
    for _ in range(200):
        if condition():
            return True
        await asyncio.sleep(0.05)
    return False


def paths(runtime):
    tried = ["a.b.c", "dyn://a.b.c", "a.b", "a.b.c.d", "a/b/c", "", "...", "A_b.c d.e", 3]
    found = {}
    for given in tried:
        try:
            runtime.endpoint(given)
            found[str(given)] = "ok"
        except TypeError:
            found[str(given)] = "TypeError"
        except Exception as error:
            found[str(given)] = said(error)
    return found


async def leaving(calls):
    """A stream that is running when its worker is shut down."""
    await calls.client("admin")
    stream = await (await calls.client("generate")).random({"mode": "slow", "n": 20}, annotated=False)
    command = await calls.admin(do="shutdown")
    return {"command": command, "items": [item async for item in stream]}


@names.dynamo_worker()
async def main(runtime):
    calls = Calls(runtime)
    seen = {"ordinary": await ordinary(calls), "handlers": await handlers(calls), "errors": await errors(calls)}
    seen |= {"contexts": await contexts(calls), "metadata": metadata(), "instances": await instances(calls)}
    seen |= {"paths": paths(runtime), "leaving": await leaving(calls)}
    print(json.dumps(seen), flush=True)
    runtime.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
    sys.exit(0)
