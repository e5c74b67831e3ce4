"""PROOF: both ends of a connection show that they know the cluster secret, and neither says it (`docs/native-plane.md §4`)."""

import hashlib
import hmac
from typing import Literal

from stator.config import Secret

__all__ = ["PROOF_SIZE", "make_proof", "proves"]

PROOF_SIZE = 32
_LABEL = b"stator native proof 1\0"
_ROLES = {"client": b"c", "worker": b"w"}


def make_proof(secret: Secret, role: Literal["client", "worker"], *, client: bytes, worker: bytes) -> bytes:
    """What the side `role` shows; `client` and `worker` are the payloads of both HELLOs, which hold nonces, process ids and features."""
    digests = (hashlib.sha256(client).digest(), hashlib.sha256(worker).digest())
    return hmac.digest(secret.reveal().encode(), b"".join((_LABEL, _ROLES[role], *digests)), "sha256")


def proves(shown: bytes, secret: Secret, role: Literal["client", "worker"], *, client: bytes, worker: bytes) -> bool:
    """Whether `shown` is what the side `role` had to show; takes the same time whatever it is."""
    return hmac.compare_digest(shown, make_proof(secret, role, client=client, worker=worker))
