"""Identity, kubeconfig, credentials and objects of the Kubernetes backend, without a server; and the emulation's server-side apply."""

import base64
import importlib
import json
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from stator import settings
from stator.config import Secret
from stator.discovery.kubernetes import KubernetesConfig, open_kubernetes
from stator.discovery.kubernetes_access import Credentials, find_access
from stator.discovery.kubernetes_identity import instance_id_of, object_name, read_identity
from stator.discovery.kubernetes_kubeconfig import Access, Material, read_kubeconfig
from stator.discovery.kubernetes_objects import Metadata, read_event, read_metadata, read_pod, read_slice
from stator.discovery.kubernetes_problem import ApiProblem
from stator.errors import ConfigError, UsageError
from stator.protocol.records import encode_record
from stator.runtime.plugins import config_type
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record
from stator.testing.kubernetes_apply import ApplyConflict, apply
from stator.testing.kubernetes_store import as_stored, matches

# -- identity


@pytest.mark.parametrize(("name", "id"), [("worker-0", 0x43710F49C0CFF), ("worker-0-side", 0xCE262DEDE36D1)])
def test_instance_ids_are_the_references(name: str, id: int) -> None:
    assert instance_id_of(name) == id


def test_instance_ids_fit_into_a_double() -> None:
    for number in range(100):
        id = instance_id_of("p" * number)
        assert int(float(id)) == id


def test_the_main_container_is_called_like_its_pod() -> None:
    assert object_name("worker-0", "main") == object_name("worker-0") == "worker-0"
    assert object_name("worker-0", "side") == "worker-0-side"


def test_files_win_over_settings(tmp_path: Path) -> None:
    (tmp_path / "pod_name").write_text("from-file\n")
    (tmp_path / "pod_namespace").write_text("namespace-from-file")
    config = KubernetesConfig(pod_name="p", pod_uid="u", namespace="n", podinfo=str(tmp_path))
    found = read_identity(config, "fallback")
    assert (found.pod, found.uid, found.namespace, found.container) == ("from-file", "u", "namespace-from-file", "")


def test_the_namespace_falls_back(caplog: pytest.LogCaptureFixture) -> None:
    assert read_identity(KubernetesConfig(podinfo=""), "account").namespace == "account"
    assert read_identity(KubernetesConfig(podinfo=""), "").namespace == "default"
    assert "POD_NAMESPACE" in caplog.text


def test_container_mode_needs_a_container() -> None:
    with pytest.raises(ConfigError, match="CONTAINER_NAME is not set"):
        read_identity(KubernetesConfig(mode="container", pod_name="p", podinfo=""), "x")


@pytest.mark.parametrize("name", ["../x", "a/b", "A", "a b", "-a", "a" * 254])
def test_names_that_kubernetes_does_not_give_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not one that Kubernetes gives"):
        read_identity(KubernetesConfig(pod_name=name, podinfo=""), "x")


def test_the_references_variables_are_read() -> None:
    env = {
        "POD_NAME": "p",
        "POD_UID": "u",
        "POD_NAMESPACE": "n",
        "CONTAINER_NAME": "c",
        "DYN_KUBE_DISCOVERY_MODE": "container",
        "KUBECONFIG": "/k",
        "KUBERNETES_SERVICE_HOST": "10.0.0.1",
        "KUBERNETES_SERVICE_PORT": "6443",
    }
    config = settings.load(KubernetesConfig, env=env)
    assert config == KubernetesConfig(
        mode="container", pod_name="p", pod_uid="u", namespace="n", container="c", kubeconfig="/k", host="10.0.0.1", port=6443
    )
    with pytest.raises(ConfigError, match="DYN_KUBE_DISCOVERY_MODE"):
        settings.load(KubernetesConfig, env={"DYN_KUBE_DISCOVERY_MODE": "node"})


def test_the_plug_in_says_which_settings_it_takes_and_brings_no_http_client() -> None:
    assert config_type(open_kubernetes) is KubernetesConfig
    script = "import sys, stator.discovery.kubernetes; sys.exit('aiohttp' in sys.modules or 'yaml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=30).returncode == 0


async def test_what_is_not_open_cannot_be_used() -> None:
    discovery = open_kubernetes(KubernetesConfig(), clock=SystemClock(), random=Random(1))
    with pytest.raises(UsageError, match="not open"):
        await discovery.register(endpoint_record(1))
    await discovery.aclose()
    with pytest.raises(UsageError, match="once"):
        await discovery.__aenter__()


# -- kubeconfig

CLUSTER = {"name": "c", "cluster": {"server": "https://api.example:6443/", "certificate-authority": "ca.pem"}}
CONTEXT = {"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "team"}}


def kubeconfig(path: Path, user: dict[str, Any], cluster: dict[str, Any] = CLUSTER) -> Path:
    path.write_text(
        json.dumps(
            {
                "current-context": "x",
                "clusters": [cluster],
                "contexts": [CONTEXT],
                "users": [{"name": "u", "user": user}],
            }
        )
    )
    return path


def test_a_kubeconfig_is_read(tmp_path: Path) -> None:
    pem = base64.b64encode(b"PEM").decode()
    path = kubeconfig(tmp_path / "config", {"token": "t0ken", "client-certificate-data": pem, "client-key": "sub/key.pem"})
    access = read_kubeconfig([path])
    assert access == Access(
        server="https://api.example:6443",
        namespace="team",
        ca=Material(file=tmp_path / "ca.pem"),
        token=Material(text=Secret("t0ken")),
        certificate=Material(text=Secret("PEM")),
        key=Material(file=tmp_path / "sub/key.pem"),
    )


def test_yaml_is_read_and_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    path.write_text(
        "current-context: x\nclusters:\n- {name: c, cluster: {server: 'http://127.0.0.1:1'}}\n"
        "contexts:\n- {name: x, context: {cluster: c}}\n"
    )
    assert read_kubeconfig([path]) == Access(server="http://127.0.0.1:1")
    real = importlib.import_module

    def without_yaml(name: str) -> Any:
        if name == "yaml":
            raise ImportError("No module named 'yaml'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without_yaml)
    with pytest.raises(ConfigError, match="pip install pyyaml") as caught:
        read_kubeconfig([path])
    assert "\n" not in str(caught.value)


def test_several_files_are_merged(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text(json.dumps({"current-context": "x", "users": [{"name": "u", "user": {"token": "first"}}]}))
    kubeconfig(second, {"token": "second"})
    config = KubernetesConfig(kubeconfig=f"{first}:{second}")
    assert find_access(config).token == Material(text=Secret("first"))


@pytest.mark.parametrize(
    ("user", "cluster", "text"),
    [
        ({"exec": {"command": "aws"}}, CLUSTER, r"helper program \(exec\).*kubectl create token"),
        ({"auth-provider": {"name": "gcp"}}, CLUSTER, r"helper program \(auth-provider\)"),
        ({"username": "a", "password": "geheim"}, CLUSTER, "has a password"),
        ({"client-key-data": "%%geheim%%"}, CLUSTER, "client-key-data is not PEM in base64"),
        ({}, {"name": "c", "cluster": {"server": "https://x", "insecure-skip-tls-verify": True}}, "is refused"),
        ({}, {"name": "c", "cluster": {"server": "https://x", "proxy-url": "http://y"}}, "has proxy-url"),
        ({"as": "admin"}, CLUSTER, "has as, which is not understood"),
        ({}, {"name": "c", "cluster": {"server": "tcp://x"}}, "no server URL"),
        ({}, {"name": "other", "cluster": {}}, "no cluster called 'c'; it has other"),
    ],
)
def test_what_is_not_understood_is_said(tmp_path: Path, user: dict[str, Any], cluster: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        read_kubeconfig([kubeconfig(tmp_path / "config", user, cluster)])
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "[1]", "a: [b", "5", '{"clusters": {}}', '{"current-context": "x"}', "\0"])
def test_a_broken_kubeconfig_is_an_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"kubeconfig .*config"):
        read_kubeconfig([path])
    with pytest.raises(ConfigError, match="cannot be read"):
        read_kubeconfig([tmp_path / "missing"])


def test_a_broken_file_is_not_quoted(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("token: geheim\n\tgeheim: [")
    with pytest.raises(ConfigError) as caught:
        read_kubeconfig([path])
    assert "geheim" not in str(caught.value)


def test_a_pod_uses_its_service_account(tmp_path: Path) -> None:
    for name in ("token", "ca.crt", "namespace"):
        (tmp_path / name).write_text(name)
    access = find_access(KubernetesConfig(host="10.0.0.1", service_account=str(tmp_path)))
    assert access.server == "https://10.0.0.1:443"
    assert access.namespace == "namespace"
    assert access.token == Material(file=tmp_path / "token")
    assert find_access(KubernetesConfig(host="fd00::1", service_account=str(tmp_path))).server == "https://[fd00::1]:443"
    (tmp_path / "token").unlink()
    with pytest.raises(ConfigError, match="automountServiceAccountToken"):
        find_access(KubernetesConfig(host="10.0.0.1", service_account=str(tmp_path)))


def test_outside_of_everything_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match="set KUBECONFIG"):
        find_access(KubernetesConfig())
    (tmp_path / ".kube").mkdir()
    kubeconfig(tmp_path / ".kube" / "config", {"token": "t"})
    assert find_access(KubernetesConfig()).server == "https://api.example:6443"


def test_credentials_follow_their_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "token"
    file.write_text("one\n")
    credentials = Credentials(Access(server="http://127.0.0.1:1", token=Material(file=file)))
    first = credentials.current()
    assert first.token.reveal() == "one"
    assert credentials.current() is first
    file.write_text("another")
    assert credentials.current().token.reveal() == "another"
    file.unlink()
    assert credentials.current().token.reveal() == "another", "it is being exchanged"
    file.write_text("two words")
    assert credentials.current().token.reveal() == "another"
    assert "two words" not in caplog.text
    with pytest.raises(ConfigError, match="cannot be used"):
        Credentials(Access(server="https://x", ca=Material(text=Secret("no pem")))).current()


# -- objects


def raw(name: str, data: Any) -> msgspec.Raw:
    return msgspec.Raw(json.dumps({"metadata": {"name": name, "resourceVersion": "5"}, "spec": {"data": data}}).encode())


def test_records_are_read_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    good, bad = endpoint_record(1), endpoint_record(2)
    body = json.loads(encode_record(good))
    data = {"endpoints": {good.key.path: body, bad.key.path: body}, "model_cards": {good.key.path: body}, "more": 5}
    found = read_metadata(raw("w", data), None)
    assert found.records == {good.key: good}
    assert len(found.bad) == 2
    assert caplog.text.count("ignored") == 2
    again = read_metadata(raw("w", data), found)
    assert again == found
    assert caplog.text.count("ignored") == 2, "reported once"


@pytest.mark.parametrize("data", [None, 5, [], {"endpoints": []}, {"endpoints": None}])
def test_an_object_without_sense_keeps_the_last_content(data: Any) -> None:
    before = Metadata(records={endpoint_record(1).key: endpoint_record(1)})
    assert read_metadata(raw("w", data), before).records == before.records
    assert read_metadata(raw("w", data), None).records == {}


def test_missing_maps_are_empty() -> None:
    before = Metadata(records={endpoint_record(1).key: endpoint_record(1)})
    assert read_metadata(raw("w", {}), before).records == {}


def test_slices_name_their_ready_pods() -> None:
    def endpoint(name: str, ready: Any, kind: str = "Pod") -> dict[str, Any]:
        return {"conditions": {"ready": ready}, "targetRef": {"kind": kind, "name": name}}

    endpoints = [endpoint("a", True), endpoint("b", False), endpoint("c", None), endpoint("d", True, "Node"), {"addresses": []}]
    data = msgspec.Raw(json.dumps({"metadata": {"name": "s"}, "endpoints": endpoints}).encode())
    assert read_slice(data, None) == {"a"}
    assert read_slice(msgspec.Raw(b'{"endpoints":null}'), frozenset({"x"})) == set()
    assert read_slice(msgspec.Raw(b'{"endpoints":5}'), frozenset({"x"})) == {"x"}


def test_pods_name_their_ready_containers() -> None:
    statuses = [{"name": "main", "ready": True}, {"name": "side", "ready": True}, {"name": "init", "ready": False}]
    pod = {"metadata": {"name": "w"}, "status": {"containerStatuses": statuses}}
    assert read_pod(msgspec.Raw(json.dumps(pod).encode()), None) == {"w", "w-side"}
    assert read_pod(msgspec.Raw(b'{"metadata":{"name":"w"}}'), None) == set()
    assert read_pod(msgspec.Raw(b'{"status":5}'), frozenset({"x"})) == {"x"}


def test_an_error_in_a_watch_is_the_servers_problem() -> None:
    with pytest.raises(ApiProblem) as caught:
        read_event(b'{"type":"ERROR","object":{"kind":"Status","code":410,"message":"too old"}}')
    assert caught.value.expired
    with pytest.raises(ApiProblem):
        read_event(b'{"type":')


# -- the emulation


def test_apply_merges_what_managers_say() -> None:
    first, managers = apply({}, {}, {"spec": {"a": 1, "b": {}}}, manager="one", force=False)
    assert first == {"spec": {"a": 1, "b": {}}}
    second, managers = apply(first, managers, {"spec": {"c": [1]}}, manager="two", force=False)
    assert second == {"spec": {"a": 1, "b": {}, "c": [1]}}
    third, managers = apply(second, managers, {"spec": {"b": {"x": 1}}}, manager="one", force=False)
    assert third == {"spec": {"b": {"x": 1}, "c": [1]}}, "what one says no more is gone, what two says stays"
    with pytest.raises(ApplyConflict, match=r'conflict with "one": .spec.b.x'):
        apply(third, managers, {"spec": {"b": {"x": 2}}}, manager="two", force=False)
    fourth, managers = apply(third, managers, {"spec": {"b": {"x": 2}}}, manager="two", force=True)
    assert fourth == {"spec": {"b": {"x": 2}}}
    assert set(managers) == {"two"}


def test_owners_go_by_their_uid() -> None:
    def owned(uid: str) -> dict[str, Any]:
        return {"metadata": {"name": "w", "ownerReferences": [{"name": "w", "uid": uid}]}}

    first, managers = apply({"metadata": {"name": "w"}}, {}, owned("1"), manager="m", force=True)
    second, _ = apply(first, managers, owned("2"), manager="m", force=True)
    assert second == owned("2"), "a successor replaces its predecessor"


def test_selectors_and_numbers() -> None:
    assert matches("a=1,b!=2,c", {"a": "1", "c": ""})
    assert not matches("a==2", {"a": "1"})
    assert as_stored({"a": [2**64 - 1, 2**63 - 1, True]}) == {"a": [float(2**64), 2**63 - 1, True]}
    assert isinstance(as_stored([2**63])[0], float)
