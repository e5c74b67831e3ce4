"""The first request of a service: proof that it answers, and the example that is shown."""

import asyncio
from collections.abc import Callable
from typing import Any

import aiohttp

__all__ = ["example_request", "first_answer"]

_POLL = 0.1
_RETRY = 2.0
"""seconds between looks at the list of models, and between requests that failed"""
_PATIENCE = 5.0
"""seconds without an answer after which the reason is shown, once per reason"""

_CHAT = "/v1/chat/completions"
_COMPLETIONS = "/v1/completions"
_TEXT = "Hello from Stator! 👋"


async def first_answer(url: str, model: str, *, say: Callable[[str], None]) -> str:
    """Wait until a small request to `model` is answered. Returns its path: chat where the model can.

    `say` is told what is waited for, when that lasts.
    """
    # The certificate may be for another name; what is asked here is only whether somebody answers.
    connector = aiohttp.TCPConnector(ssl=False)
    async with aiohttp.ClientSession(url, connector=connector, timeout=aiohttp.ClientTimeout(total=60)) as session:
        await _listed(session, model, say)
        told = ""
        while True:
            refusal = await _refusal(session, _CHAT, {"model": model, "max_tokens": 1, "messages": _messages("ready?")})
            if not refusal:
                return _CHAT
            if not await _refusal(session, _COMPLETIONS, {"model": model, "max_tokens": 1, "prompt": "ready?"}):
                return _COMPLETIONS
            if refusal != told:
                say(f"a first answer; {refusal}")
                told = refusal
            await asyncio.sleep(_RETRY)


async def _listed(session: aiohttp.ClientSession, model: str, say: Callable[[str], None]) -> None:
    """Wait until a frontend knows the model."""
    loop = asyncio.get_running_loop()
    patient_until = loop.time() + _PATIENCE
    told = False
    while True:
        try:
            async with session.get("/health") as answer:
                found = [entry["model"] for entry in (await answer.json())["instances"]]
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError):
            found = None
        if found is not None and model in found:
            return
        if not told and loop.time() > patient_until:
            told = True
            say("a frontend" if found is None else f"the frontend to load model {model}")
        await asyncio.sleep(_POLL)


async def _refusal(session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> str:
    """Why the request was not answered; "" if it was."""
    try:
        async with session.post(path, json=body) as answer:
            if answer.status in (200, 401):  # without a key, that is the right answer where keys are asked for
                return ""
            return f"{answer.status} {(await answer.json())['error']['message']}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError, TypeError) as error:
        return f"{type(error).__name__}: {error}"


def example_request(path: str, model: str) -> dict[str, Any]:
    """The body of the request that users are shown."""
    body = {"messages": _messages(_TEXT)} if path == _CHAT else {"prompt": _TEXT}
    return {"model": model, "stream": True, **body}


def _messages(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
