"""The example of deploy/kubernetes as processes of this machine: the manifests' commands and variables, an emulated API server with TLS
and the roles of the manifests, and a kubelet that asks the readiness probes."""

import asyncio
import json
import signal
import socket
import ssl
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from stator.testing.certificates import Authority
from stator.testing.kubernetes_api import KubernetesApi
from stator.testing.serve_process import StatorProcess, run_stator

DEPLOY = Path(__file__).parents[2] / "deploy" / "kubernetes"
SECRET = "a secret of at least sixteen characters"

pytestmark = pytest.mark.timeout(120)


def template(name: str) -> dict[str, Any]:
    """The pod of a Deployment in a manifest."""
    documents = yaml.safe_load_all((DEPLOY / name).read_text("utf-8"))
    (deployment,) = (document for document in documents if document["kind"] == "Deployment")
    return deployment["spec"]["template"]


def rights(*roles: str) -> set[tuple[str, str, str]]:
    documents = [each for each in yaml.safe_load_all((DEPLOY / "rbac.yaml").read_text("utf-8")) if each["kind"] == "Role"]
    rules = [rule for each in documents if each["metadata"]["name"] in roles for rule in each["rules"]]
    return {(g, r, v) for rule in rules for g in rule["apiGroups"] for r in rule["resources"] for v in rule["verbs"]}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON; (0, None) while nobody answers."""
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, None
    except OSError:
        return 0, None


class Node:
    """A node of the cluster: starts pods as the manifests say, and tells the API server which are ready."""

    def __init__(self, api: KubernetesApi, directory: Path, stack: AsyncExitStack) -> None:
        self.api = api
        self.directory = directory
        self.pods: dict[str, tuple[StatorProcess, dict[str, str]]] = {}
        self._stack = stack
        api.service_account(directory / "account")
        (directory / "cluster-secret").write_text(SECRET)

    async def start(self, manifest: str, name: str) -> dict[str, str]:
        """Start a pod; the answer is its environment."""
        pod = template(manifest)
        (container,) = pod["spec"]["containers"]
        uid = self.api.pods.add(name, ready=False)
        home = self.directory / name
        podinfo = home / "podinfo"
        await asyncio.to_thread(podinfo.mkdir, parents=True)
        values = {"metadata.name": name, "metadata.uid": uid, "metadata.namespace": "default", "status.podIP": "127.0.0.1"}
        environment = self._environment(container, values)
        for volume in pod["spec"]["volumes"]:
            for item in volume.get("downwardAPI", {}).get("items", ()):
                (podinfo / item["path"]).write_text(values[item["fieldRef"]["fieldPath"]])
        (home / "run").mkdir(mode=0o700)
        environment |= {
            "STATOR_KUBERNETES_PODINFO": str(podinfo),
            "STATOR_KUBERNETES_SERVICE_ACCOUNT": str(self.directory / "account"),
            "KUBERNETES_SERVICE_HOST": "127.0.0.1",
            "KUBERNETES_SERVICE_PORT": str(self.api.port),
            "XDG_RUNTIME_DIR": str(home / "run"),
        }
        process = StatorProcess(*container["args"], environment=environment)
        self._stack.push_async_callback(asyncio.to_thread, process.__exit__, None, None, None)
        self.pods[name] = (process, environment)
        return environment

    def _environment(self, container: dict[str, Any], values: dict[str, str]) -> dict[str, str]:
        """That of the manifest; ports are free ones here, and nothing listens beyond loopback."""
        found: dict[str, str] = {}
        for variable in container["env"]:
            value = variable.get("value")
            found[variable["name"]] = values[variable["valueFrom"]["fieldRef"]["fieldPath"]] if value is None else value
        for name, value in found.items():
            if value == "0.0.0.0":
                found[name] = "127.0.0.1"
            elif name in ("STATOR_HEALTH_PORT", "STATOR_HTTP_PORT"):
                found[name] = str(free_port())
            elif name == "STATOR_CLUSTER_SECRET_FILE":
                found[name] = str(self.directory / "cluster-secret")
        return found

    async def probe(self) -> None:
        """What the kubelet does, until cancelled."""
        while True:
            for name, (process, environment) in tuple(self.pods.items()):
                url = f"http://127.0.0.1:{environment['STATOR_HEALTH_PORT']}/health"
                status = (await asyncio.to_thread(ask, url))[0] if process.process.poll() is None else 0
                self.api.pods.set_ready(name, status == 200)
            await asyncio.sleep(0.2)


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    authority = Authority(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("api"))
    async with (
        KubernetesApi(token="the-accounts-token", tls=context, ca=authority.path.read_text()) as api,
        AsyncExitStack() as stack,
    ):
        api.allowed = rights("stator-look-on", "stator-register")
        found = Node(api, tmp_path, stack)
        kubelet = asyncio.get_running_loop().create_task(found.probe())
        try:
            yield found
        finally:
            kubelet.cancel()
            await asyncio.wait({kubelet})


async def completes(url: str, *, within: float = 40.0) -> None:
    """Ask until an answer comes."""
    body = {"model": "echo", "messages": [{"role": "user", "content": "hello world"}], "max_tokens": 4}
    deadline = asyncio.get_running_loop().time() + within
    status, answer = 0, None
    while status != 200:
        assert asyncio.get_running_loop().time() < deadline, f"the last answer was {status}"
        await asyncio.sleep(0.1)
        status, answer = await asyncio.to_thread(ask, f"{url}/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"]


async def until_gone(node: Node, name: str, *, within: float = 20.0) -> None:
    async with asyncio.timeout(within):
        while node.api.metadata(name) is not None:
            await asyncio.sleep(0.05)


async def test_the_example_serves(node: Node, tmp_path: Path) -> None:
    frontend = await node.start("frontend.yaml", "stator-frontend-0")
    worker = await node.start("workers.yaml", "stator-workers-0")
    url = f"http://127.0.0.1:{frontend['STATOR_HTTP_PORT']}"
    try:
        await completes(url)
    except AssertionError as error:
        logs = "\n\n".join(process.output for process, _ in node.pods.values())
        raise AssertionError(f"{error}\n{logs}") from None
    found = node.api.metadata("stator-workers-0")
    assert found is not None
    assert found["metadata"]["ownerReferences"][0]["uid"] == node.api.pods.uid("stator-workers-0")
    assert node.api.metadata("stator-frontend-0") is None, "a frontend registers nothing"

    # somebody outside looks on
    kubeconfig = tmp_path / "kubeconfig"
    kubeconfig.write_text(node.api.kubeconfig())
    listed = await asyncio.to_thread(
        run_stator, "ls", "--json", environment={"STATOR_DISCOVERY": "kubernetes", "KUBECONFIG": str(kubeconfig)}
    )
    assert listed.returncode == 0, listed.stderr
    rows = [json.loads(line) for line in listed.stdout.splitlines()]
    assert "dynamo.backend.generate" in {row["endpoint"] for row in rows}

    # the API server goes away and comes back: nobody notices
    await node.api.stop()
    for _ in range(10):
        await completes(url, within=5)
    await node.api.start()

    # a second worker comes, the first one goes: by the signal that Kubernetes sends
    await node.start("workers.yaml", "stator-workers-1")
    async with asyncio.timeout(30):
        while not (node.api.metadata("stator-workers-1") or {"spec": {"data": {"model_cards": {}}}})["spec"]["data"][
            "model_cards"
        ]:
            await asyncio.sleep(0.05)
    first, _ = node.pods["stator-workers-0"]
    first.send(signal.SIGTERM)
    assert await asyncio.to_thread(first.wait, 30.0) == 0
    await until_gone(node, "stator-workers-0")
    await completes(url, within=20)

    # a killed one is unready, and its object goes with its pod
    second, _ = node.pods["stator-workers-1"]
    second.send(signal.SIGKILL)
    await asyncio.to_thread(second.wait, 10.0)
    node.pods.pop("stator-workers-1")
    node.api.pods.delete("stator-workers-1")
    await until_gone(node, "stator-workers-1")

    for process, environment in [*node.pods.values(), (second, worker)]:
        for secret in (SECRET, "the-accounts-token"):
            assert secret not in process.output
            assert secret not in " ".join(environment.values())
