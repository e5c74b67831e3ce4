"""`x-ratelimit-…` as OpenAI sends it, so that clients which pace themselves by it do so here too."""

import math

from stator.frontend.token_bucket import TokenBucket

__all__ = ["duration", "rate_headers"]


def rate_headers(kind: str, bucket: TokenBucket, now: float) -> dict[str, str]:
    """Limit, what is left of it, and when it is whole again; `kind` is `requests` or `tokens`."""
    return {
        f"x-ratelimit-limit-{kind}": str(int(bucket.capacity)),
        f"x-ratelimit-remaining-{kind}": str(max(0, math.floor(bucket.level(now)))),
        f"x-ratelimit-reset-{kind}": duration(bucket.until_full(now)),
    }


def duration(seconds: float) -> str:
    """Seconds as `17ms`, `1.5s`, `6m0s` or `1h0m0s`, rounded up to milliseconds."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds < 1000:
        return f"{max(0, milliseconds)}ms"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if not (hours or minutes):
        return text
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
