"""The handler of both workers whose pages are compared; the reference runs it with its own interpreter."""

import asyncio


async def items(request, is_stopped):
    """What `request` asks for; `is_stopped` says whether its caller wants no more."""
    mode = request["mode"]
    if mode == "count":
        for number in range(request["n"]):
            yield {"token_ids": [number], "text": "tok"}
    elif mode == "error":
        for number in range(request["n"]):
            yield number
        raise ValueError("as told")
    elif mode == "crash":
        for number in range(request["n"]):
            yield number
        raise RuntimeError("as told")
    elif mode == "unsendable":
        for number in range(request["n"]):
            yield number
        yield object()
    elif mode == "until stopped":
        number = 0
        while not is_stopped():
            yield number
            number += 1
            await asyncio.sleep(0.05)  # long enough for whatever the caller does after an item
    elif mode == "deaf":  # goes on whatever its caller wants, for a while
        for number in range(200):
            yield number
            await asyncio.sleep(0.005)
    elif mode == "silent":  # says one thing and waits
        yield 0
        for _ in range(400):
            if is_stopped():
                return
            await asyncio.sleep(0.005)
    elif mode == "late":
        await asyncio.sleep(request["seconds"])
        yield "late"
    else:
        raise KeyError(mode)


async def conversation(inputs):
    """Says each of `inputs` again."""
    async for item in inputs:
        yield item
