"""The status server of a process in Kubernetes shows what the process has registered (`spec/20 §4.4`)."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from stator import Context, Runtime
from stator.testing.kubernetes_api import KubernetesApi


async def generate(request: Any, context: Context) -> AsyncIterator[Any]:
    yield request


async def test_the_metadata_route_shows_the_records_of_this_process(tmp_path: Path) -> None:
    async with KubernetesApi() as api:
        kubeconfig = tmp_path / "config"
        kubeconfig.write_text(api.kubeconfig())
        async with (
            Runtime.connect(
                discovery="kubernetes",
                kubernetes__kubeconfig=str(kubeconfig),
                kubernetes__podinfo="",
                kubernetes__pod_name="worker-0",
                kubernetes__pod_uid=api.pods.add("worker-0"),
                health__port=0,
            ) as runtime,
            runtime.endpoint("demo.backend.generate").serving(generate),
            aiohttp.ClientSession() as session,
            session.get(f"{runtime.status_url}/metadata") as response,
        ):
            assert response.status == 200
            shown = await response.json()
            assert shown == {**api.metadata("worker-0")["spec"]["data"]}
            assert list(shown["endpoints"]) == [f"demo/backend/generate/{runtime.instance_id:x}"]
