"""Identities for NATS servers in tests: nkeys, and an operator with an account and its users. Needs the library `cryptography`.

with nats_server(path, settings=operator.settings) as server:
    credentials.write_text(operator.user())
"""

import base64
import binascii
import json
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["NatsIdentity", "NatsOperator"]

_SEED = 18 << 3
_ROLES = {"operator": 14 << 3, "account": 0, "user": 20 << 3}
_LIMITS = {"subs": -1, "data": -1, "payload": -1}


class NatsIdentity:
    """A new key pair of a role."""

    def __init__(self, role: str) -> None:
        self._key = Ed25519PrivateKey.generate()
        prefix = _ROLES[role]
        self.role = role
        self.public = _text(bytes((prefix,)) + self._key.public_key().public_bytes_raw())
        self.seed = _text(bytes((_SEED | prefix >> 5, (prefix & 31) << 3)) + self._key.private_bytes_raw())

    def token(self, subject: "NatsIdentity", **facts: Any) -> str:
        """A JWT in which this identity vouches for `subject`."""
        claims = {
            "jti": subject.public,
            "iat": int(datetime.now(UTC).timestamp()),
            "iss": self.public,
            "name": f"test {subject.role}",
            "sub": subject.public,
            "nats": {**facts, "type": subject.role, "version": 2},
        }
        parts = (json.dumps(part).encode() for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims))
        signed = b".".join(map(_urlsafe, parts))
        return (signed + b"." + _urlsafe(self._key.sign(signed))).decode()


class NatsOperator:
    """Who runs a server, with one account."""

    def __init__(self) -> None:
        self._operator, self._account = NatsIdentity("operator"), NatsIdentity("account")

    @property
    def settings(self) -> dict[str, str]:
        """For the server."""
        limits = {**_LIMITS, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
        account = self._operator.token(self._account, limits=limits)
        return {
            "operator": self._operator.token(self._operator),
            "resolver": "MEMORY",
            "resolver_preload": f"{{ {self._account.public}: {account} }}",
        }

    def user(self) -> str:
        """The credentials file of a new user."""
        user = NatsIdentity("user")
        jwt = self._account.token(user, **_LIMITS)
        return (
            f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{user.seed}\n------END USER NKEY SEED------\n"
        )


def _text(raw: bytes) -> str:
    whole = raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(whole).decode().rstrip("=")


def _urlsafe(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
