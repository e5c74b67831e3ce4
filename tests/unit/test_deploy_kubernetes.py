"""The manifests under deploy/kubernetes: they parse, fit together, name settings that exist, and ask for exactly the rights we use."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
import yaml

from stator import settings
from stator.config import fields_of
from stator.discovery.kubernetes import KubernetesConfig, open_kubernetes
from stator.errors import Unavailable
from stator.health import HealthConfig
from stator.protocol.records import EndpointRecord, Query
from stator.tasks import SystemClock
from stator.testing.discovery_suite import endpoint_record
from stator.testing.kubernetes_api import KubernetesApi
from stator.testing.kubernetes_pods import LABELS
from stator.testing.kubernetes_store import METADATA
from stator.worker import WorkerConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy" / "kubernetes"
LOOK_ON = "stator-look-on"
REGISTER = "stator-register"


def documents(name: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all((DEPLOY / name).read_text("utf-8")) if document]


EVERYTHING: list[dict[str, Any]] = [
    document
    for name in yaml.safe_load((DEPLOY / "kustomization.yaml").read_text("utf-8"))["resources"]
    for document in documents(name)
]


def the(kind: str, name: str) -> dict[str, Any]:
    (found,) = (each for each in EVERYTHING if (each["kind"], each["metadata"]["name"]) == (kind, name))
    return found


def deployments() -> list[dict[str, Any]]:
    return [each for each in EVERYTHING if each["kind"] == "Deployment"]


def container(deployment: dict[str, Any]) -> dict[str, Any]:
    (found,) = deployment["spec"]["template"]["spec"]["containers"]
    return found


def test_every_file_is_part_of_the_kustomization() -> None:
    named = set(yaml.safe_load((DEPLOY / "kustomization.yaml").read_text("utf-8"))["resources"])
    assert named | {"kustomization.yaml"} == {path.name for path in DEPLOY.glob("*.yaml")}


def test_everything_has_what_kubernetes_asks_for() -> None:
    assert len(EVERYTHING) == 11
    for each in EVERYTHING:
        assert each["apiVersion"]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?", each["metadata"]["name"])
    assert len({(each["kind"], each["metadata"]["name"]) for each in EVERYTHING}) == len(EVERYTHING)


def test_the_custom_resource_is_the_references() -> None:
    crd = the("CustomResourceDefinition", "dynamoworkermetadatas.nvidia.com")
    spec = crd["spec"]
    assert crd["metadata"]["name"] == f"{spec['names']['plural']}.{spec['group']}"
    (version,) = spec["versions"]
    found = (spec["group"], version["name"], spec["names"]["kind"], spec["names"]["plural"])
    assert found == (METADATA.group, METADATA.version, METADATA.kind, METADATA.plural)
    assert spec["scope"] == "Namespaced"
    assert version["served"]
    assert version["storage"]
    data = version["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]["data"]
    assert data == {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def test_roles_are_bound_to_accounts_that_exist_and_are_used() -> None:
    accounts = {each["metadata"]["name"] for each in EVERYTHING if each["kind"] == "ServiceAccount"}
    bound: set[str] = set()
    for binding in (each for each in EVERYTHING if each["kind"] == "RoleBinding"):
        the("Role", binding["roleRef"]["name"])
        bound |= {subject["name"] for subject in binding["subjects"] if subject["kind"] == "ServiceAccount"}
    used = {each["spec"]["template"]["spec"]["serviceAccountName"] for each in deployments()}
    assert accounts == bound == used


@pytest.mark.parametrize("deployment", deployments(), ids=lambda each: each["metadata"]["name"])
def test_labels_ports_and_volumes_fit_together(deployment: dict[str, Any]) -> None:
    spec = deployment["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    service = the("Service", deployment["metadata"]["name"])
    assert service["spec"]["selector"].items() <= labels.items()
    others = [each for each in deployments() if each is not deployment]
    assert not any(
        service["spec"]["selector"].items() <= other["spec"]["template"]["metadata"]["labels"].items() for other in others
    )
    main = container(deployment)
    ports = {port["name"]: port["containerPort"] for port in main["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports.keys()
    probe = main["readinessProbe"]["httpGet"]
    variables = {variable["name"]: variable.get("value", "") for variable in main["env"]}
    assert str(ports[probe["port"]]) == variables["STATOR_HEALTH_PORT"]
    assert probe["path"] == settings.load(_config("health"), env={}).health_path
    assert {mount["name"] for mount in main["volumeMounts"]} == {
        volume["name"] for volume in spec["template"]["spec"]["volumes"]
    }
    mounted = [mount["mountPath"] for mount in main["volumeMounts"]]
    for value in variables.values():
        assert not value.startswith("/") or any(Path(value).is_relative_to(path) for path in mounted), value
    assert labels.items() & LABELS.items() in (set(), set(LABELS.items()))


def test_the_slices_of_the_workers_are_found() -> None:
    """Kubernetes copies a Service's labels to its slices, and discovery selects slices by label."""
    assert LABELS.items() <= the("Service", "stator-workers")["metadata"]["labels"].items()
    assert not LABELS.keys() & the("Service", "stator-frontend")["metadata"]["labels"].keys()
    assert LABELS.items() <= the("Deployment", "stator-workers")["spec"]["template"]["metadata"]["labels"].items()


def test_workers_have_the_time_that_ending_takes() -> None:
    worker = settings.load(_config("worker"), env={})
    needed = worker.grace_period + worker.drain_timeout + worker.cleanup_timeout
    assert the("Deployment", "stator-workers")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] > needed


def _config(section: str) -> Any:
    return {"health": HealthConfig, "worker": WorkerConfig}[section]


@pytest.mark.parametrize("deployment", deployments(), ids=lambda each: each["metadata"]["name"])
def test_every_setting_that_is_named_exists(deployment: dict[str, Any]) -> None:
    known = {dyn for config in (KubernetesConfig,) for field in fields_of(config) for dyn in field.setting.dyn_names} | {
        "POD_IP"
    }
    env: dict[str, str] = {}
    for variable in container(deployment)["env"]:
        name = variable["name"]
        assert name.startswith("STATOR_") or name in known | {"XDG_RUNTIME_DIR"}, name
        env[name] = variable.get("value", "10.0.0.1")
    settings.check_names(env={name: value for name, value in env.items() if name.startswith("STATOR_")})


@pytest.mark.parametrize("deployment", deployments(), ids=lambda each: each["metadata"]["name"])
def test_the_commands_exist(deployment: dict[str, Any]) -> None:
    command, *options = container(deployment)["args"]
    shown = subprocess.run(
        [sys.executable, "-m", "stator", command, "--help"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    for option in options:
        assert not option.startswith("--") or option in shown


def test_the_downward_volume_has_what_discovery_reads() -> None:
    pod = the("Deployment", "stator-workers")["spec"]["template"]["spec"]
    (volume,) = (each for each in pod["volumes"] if "downwardAPI" in each)
    items = {item["path"]: item["fieldRef"]["fieldPath"] for item in volume["downwardAPI"]["items"]}
    assert items == {"pod_name": "metadata.name", "pod_uid": "metadata.uid", "pod_namespace": "metadata.namespace"}
    (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == volume["name"])
    assert mount["mountPath"] == settings.load(KubernetesConfig, env={}).podinfo


def test_readable_only_where_it_must_be_written() -> None:
    for deployment in deployments():
        pod = deployment["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        security = container(deployment)["securityContext"]
        assert security["readOnlyRootFilesystem"]
        assert not security["allowPrivilegeEscalation"]
        assert security["capabilities"]["drop"] == ["ALL"]


def rights(role: str) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in the("Role", role)["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


async def test_the_roles_allow_what_is_used_and_nothing_else(tmp_path: Path) -> None:
    """One life of a worker and of an onlooker in each mode, under the roles; what was asked for is what they allow."""
    async with KubernetesApi() as api:
        path = tmp_path / "config"
        path.write_text(api.kubeconfig())
        used: dict[str, set[tuple[str, str, str]]] = {LOOK_ON: set(), REGISTER: set()}
        for mode in ("pod", "container"):
            uid = api.pods.add(f"worker-{mode}", "side")
            onlooker = KubernetesConfig(mode=mode, kubeconfig=str(path), podinfo="", debounce=0.0)
            worker = KubernetesConfig(
                mode=mode,
                pod_name=f"worker-{mode}",
                pod_uid=uid,
                container="side",
                kubeconfig=str(path),
                podinfo="",
                debounce=0.0,
            )
            api.allowed = rights(LOOK_ON)
            api.calls.clear()
            async with open_kubernetes(onlooker, clock=SystemClock(), random=Random()) as discovery:
                await discovery.list(Query(EndpointRecord.bucket))
                await _watches(api, 2)
            used[LOOK_ON] |= {call.right for call in api.calls}
            api.allowed = rights(LOOK_ON) | rights(REGISTER)
            api.calls.clear()
            async with open_kubernetes(worker, clock=SystemClock(), random=Random()) as discovery:
                record = endpoint_record(discovery.instance_id)
                await discovery.register(record)
                assert await discovery.list(Query(EndpointRecord.bucket)) == [record]
                await _watches(api, 2)
            used[REGISTER] |= {call.right for call in api.calls} - used[LOOK_ON]
    assert used[LOOK_ON] == rights(LOOK_ON)
    assert used[REGISTER] | {("nvidia.com", "dynamoworkermetadatas", "create")} == rights(REGISTER), "create: see the next test"


async def _watches(api: KubernetesApi, number: int) -> None:
    async with asyncio.timeout(5):
        while api.watches.open < number:
            await asyncio.sleep(0.005)


async def test_an_apply_that_creates_needs_the_right_to_create(tmp_path: Path) -> None:
    async with KubernetesApi() as api:
        (tmp_path / "config").write_text(api.kubeconfig())
        uid = api.pods.add("worker-0")
        api.allowed = (rights(LOOK_ON) | rights(REGISTER)) - {("nvidia.com", "dynamoworkermetadatas", "create")}
        config = KubernetesConfig(pod_name="worker-0", pod_uid=uid, kubeconfig=str(tmp_path / "config"), podinfo="")
        async with open_kubernetes(config, clock=SystemClock(), random=Random()) as discovery:
            with pytest.raises(Unavailable, match="cannot create resource"):
                await discovery.register(endpoint_record(discovery.instance_id))


def test_the_page_names_every_file_and_the_settings() -> None:
    page = (ROOT / "docs" / "kubernetes.md").read_text("utf-8")
    for path in DEPLOY.iterdir():
        assert path.name in page, path.name
    for field in fields_of(KubernetesConfig):
        assert field.variable in page, field.variable
