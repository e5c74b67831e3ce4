"""The reference 1.6.1 and Stator over mutual TLS on TCP, both ways, with the reference's own variables (`spec/10 §8`)."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from interop.exchanges import Exchanges, Place, count
from interop.peers import REFERENCE_NEW, Peer, discovery_root, needs_newer_reference
from stator.errors import StatorError
from stator.testing.certificates import Authority

pytestmark = [pytest.mark.interop, pytest.mark.timeout(90), needs_newer_reference]


class SecuredPlace(Place, frozen=True, kw_only=True):
    """Each side has a certificate of one authority and demands one of the other."""

    authority: Path
    ours: tuple[Path, Path]
    theirs: tuple[Path, Path]

    @property
    def variables(self) -> dict[str, str]:
        cert, key = map(str, self.theirs)
        return {
            "DYN_TCP_TLS_CERT_PATH": cert,
            "DYN_TCP_TLS_KEY_PATH": key,
            "DYN_TCP_TLS_CA_CERT_PATH": str(self.authority),
            "DYN_TCP_TLS_CLIENT_CA_CERT_PATH": str(self.authority),
            "DYN_TCP_TLS_CLIENT_CERT_PATH": cert,
            "DYN_TCP_TLS_CLIENT_KEY_PATH": key,
            "DYN_TCP_TLS_SERVER_NAME": "stator",
        }

    @property
    def settings(self) -> dict[str, Any]:
        cert, key = self.ours
        return super().settings | {
            "tls__cert_path": cert,
            "tls__key_path": key,
            "tls__ca_cert_path": self.authority,
            "tls__client_ca_cert_path": self.authority,
            "tls__server_name": "stator",
        }


class TestNewerTls(Exchanges):
    reference: ClassVar[Path] = REFERENCE_NEW
    error_text: ClassVar[str] = "ValueError: InvalidRequest: ValueError: boom"
    unsendable: ClassVar[str] = "ValueError: Internal: object value cannot be sent"
    overloaded: ClassVar[str] = "CapacityExhausted"

    @pytest.fixture(scope="class")
    @classmethod
    def place(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
        authority = Authority(tmp_path_factory.mktemp("tls"))
        yield SecuredPlace(
            root=discovery_root(tmp_path_factory),
            python=cls.reference,
            nats=None,
            etcd=None,
            authority=authority.path,
            ours=authority.issue("ours"),
            theirs=authority.issue("theirs"),
        )

    async def test_without_certificates_its_worker_is_not_reached(self, place: Place, worker: Peer) -> None:
        plain = Place(root=place.root, python=place.python, nats=None, etcd=None)
        async with plain.calling("generate") as client, asyncio.timeout(20):
            with pytest.raises(StatorError):
                await client.generate({"mode": "count", "n": 1}, retry="never").collect()

    async def test_without_certificates_its_client_does_not_reach_us(self, place: Place, tmp_path_factory: Any) -> None:
        async with place.working(count) as ours:
            plain = Place(root=place.root, python=place.python, nats=None, etcd=None)
            with plain.peer("peer_client.py") as stranger:
                answer = await stranger.ask(endpoint=ours.endpoint, request={"n": 1})
            assert answer["error"] and answer["items"] == [], answer
            assert ours.contexts == []
