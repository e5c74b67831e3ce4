"""Kubernetes discovery the way a pod does it: over TLS, with the files of its service account; and by client certificate."""

import asyncio
import base64
import json
import os
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from stator.discovery.kubernetes import KubernetesConfig, KubernetesDiscovery, open_kubernetes
from stator.errors import ConfigError, Unavailable
from stator.protocol.records import EndpointRecord, Query
from stator.tasks import SystemClock
from stator.testing.certificates import Authority
from stator.testing.discovery_suite import endpoint_record
from stator.testing.kubernetes_api import KubernetesApi
from stator.testing.plane_suite import eventually

ENDPOINTS = Query(EndpointRecord.bucket)
SOON = 0.3
"""seconds; who gets no answer tries for twice as long, and is refused again and again meanwhile"""

pytestmark = pytest.mark.timeout(60)


class Pod:
    """An API server with TLS, and what a pod of its cluster finds in its file system."""

    def __init__(self, api: KubernetesApi, authority: Authority, directory: Path) -> None:
        self.api = api
        self.authority = authority
        self.account = directory / "account"
        api.service_account(self.account)

    def open(self, **settings: Any) -> KubernetesDiscovery:
        uid = self.api.pods.add("worker-0")
        fields = {
            "pod_name": "worker-0",
            "pod_uid": uid,
            "podinfo": "",
            "host": "127.0.0.1",
            "port": self.api.port,
            "service_account": str(self.account),
            "debounce": 0.02,
            "answer_timeout": 1.0,
        }
        return open_kubernetes(KubernetesConfig(**{**fields, **settings}), clock=SystemClock(), random=Random())


def server_context(authority: Authority, *, name: str = "api", mutual: bool = False, **options: Any) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue(name, **options))
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(authority.path)
    return context


@asynccontextmanager
async def opened(directory: Path, **options: Any) -> AsyncIterator[Pod]:
    authority = Authority(directory)
    context = server_context(authority, **options)
    async with KubernetesApi(token="letmein", tls=context, ca=authority.path.read_text()) as api:
        yield Pod(api, authority, directory)


async def works(worker: KubernetesDiscovery) -> None:
    record = endpoint_record(worker.instance_id)
    assert await worker.register(record)
    assert await worker.list(ENDPOINTS) == [record]
    assert await worker.unregister(record.key)


async def test_a_pod_gets_in_with_its_service_account(tmp_path: Path) -> None:
    async with opened(tmp_path) as pod, pod.open() as worker:
        assert worker.status.location == f"https://127.0.0.1:{pod.api.port} namespace default"
        await works(worker)


async def test_a_new_token_is_used_without_a_restart(tmp_path: Path) -> None:
    """As the kubelet does it: `..data` is replaced by a link to another directory."""
    async with opened(tmp_path) as pod:
        real = tmp_path / "first"
        shutil.move(pod.account, real)
        pod.account.symlink_to(real)
        async with pod.open() as worker:
            await works(worker)
            pod.api.token = "the-second-token"
            pod.api.service_account(tmp_path / "second")
            os.symlink(tmp_path / "second", tmp_path / "link")
            os.replace(tmp_path / "link", pod.account)
            pod.api.close_watches()
            await works(worker)
            await eventually(lambda: worker.status.connected)


async def test_a_new_authority_is_used_without_a_restart(tmp_path: Path) -> None:
    async with opened(tmp_path) as pod, pod.open() as worker:
        await works(worker)
        await pod.api.stop()
        (tmp_path / "new").mkdir()
        authority = Authority(tmp_path / "new")
        pod.api.set_tls(server_context(authority), authority.path.read_text())
        await pod.api.start()
        await eventually(lambda: "TLS" in worker.status.reason or "certificate" in worker.status.reason, within=10)
        pod.api.service_account(pod.account)
        await eventually(lambda: worker.status.connected, within=15)
        await works(worker)


async def test_a_server_of_another_authority_is_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as pod:
        (tmp_path / "other").mkdir()
        (pod.account / "ca.crt").write_text(Authority(tmp_path / "other").path.read_text())
        with pytest.raises(Unavailable, match=r"(?i)certificate.verify.failed"):
            async with asyncio.timeout(10):
                await pod.open(answer_timeout=SOON).__aenter__()
        assert pod.api.calls == [], "the token was sent to nobody"


async def test_a_server_of_another_name_is_refused_unless_that_is_meant(tmp_path: Path) -> None:
    async with opened(tmp_path, hosts=("kubernetes.default.svc",)) as pod:
        with pytest.raises(Unavailable, match=r"(?i)certificate"):
            await pod.open(answer_timeout=SOON).__aenter__()
        config = json.loads(pod.api.kubeconfig())
        config["clusters"][0]["cluster"]["tls-server-name"] = "kubernetes.default.svc"
        path = tmp_path / "config"
        path.write_text(json.dumps(config))
        async with pod.open(kubeconfig=str(path)) as worker:
            await works(worker)


async def test_plain_text_and_tls_do_not_wait_for_each_other(tmp_path: Path) -> None:
    async with opened(tmp_path) as pod, KubernetesApi() as plain:
        with pytest.raises(Unavailable):
            async with asyncio.timeout(10):
                await pod.open(port=plain.port, answer_timeout=SOON).__aenter__()
        path = tmp_path / "config"
        path.write_text(pod.api.kubeconfig().replace("https://", "http://"))
        with pytest.raises((Unavailable, ConfigError)):
            async with asyncio.timeout(10):
                await pod.open(kubeconfig=str(path), answer_timeout=SOON).__aenter__()


@pytest.mark.parametrize("inline", [True, False], ids=["in the kubeconfig", "in files"])
async def test_a_client_certificate_gets_in(tmp_path: Path, inline: bool) -> None:
    async with opened(tmp_path, mutual=True) as pod:
        certificate, key = pod.authority.issue("tester")
        user = {"token": "letmein"}
        for name, path in (("client-certificate", certificate), ("client-key", key)):
            if inline:
                user[f"{name}-data"] = base64.b64encode(path.read_bytes()).decode()
            else:
                user[name] = path.name
        path = tmp_path / "config"
        path.write_text(pod.api.kubeconfig(**user))
        async with pod.open(kubeconfig=str(path)) as worker:
            await works(worker)
        path.write_text(pod.api.kubeconfig(token="letmein"))
        with pytest.raises(Unavailable):
            async with asyncio.timeout(10):
                await pod.open(kubeconfig=str(path), answer_timeout=SOON).__aenter__()
