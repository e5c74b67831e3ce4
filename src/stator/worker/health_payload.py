"""The request that the canary sends (`spec/45 §10`)."""

import asyncio
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from stator.worker.engine import LLMEngine

__all__ = ["DEFAULT_PAYLOAD", "health_payload"]

logger = logging.getLogger(__name__)

PROBE = "_HEALTH_CHECK"
"""the key that tells engines of a probe"""

DEFAULT_PAYLOAD: Mapping[str, Any] = {
    "token_ids": [1],
    "stop_conditions": {"max_tokens": 1, "ignore_eos": True},
    "sampling_options": {"temperature": 0.0},
}
"""one token, greedy"""


async def health_payload(engine: LLMEngine, configured: str) -> dict[str, Any] | None:
    """What the operator has `configured` (a JSON object, or `@` and the path of a file with one), else the engine's own, else one token.

    Marked as a probe. None: no canary, because the engine wants none or cannot say. A text that is no JSON object is logged and ignored. No
    request goes without `token_ids`: the default's are put in.
    """
    given = await _configured(configured) if configured else None
    if given is None:
        try:
            own = engine.health_payload()
        except Exception as error:
            logger.warning("engine.health_payload() failed; canary disabled for this endpoint: %r", error)
            return None
        if own is not None and not own:
            return None
        given = dict(DEFAULT_PAYLOAD if own is None else own)
    return {"token_ids": DEFAULT_PAYLOAD["token_ids"], **given, PROBE: True}


async def _configured(text: str) -> dict[str, Any] | None:
    try:
        data = await asyncio.to_thread(Path(text[1:]).read_bytes) if text.startswith("@") else text.encode()
        value: Any = msgspec.json.decode(data)
    except (OSError, UnicodeError, msgspec.DecodeError, RecursionError) as error:
        logger.warning("the canary payload in the settings is ignored: %s", error)
        return None
    if not isinstance(value, dict):
        logger.warning("the canary payload in the settings is ignored: expected a JSON object, got %s", type(value).__name__)
        return None
    return cast(dict[str, Any], value)
