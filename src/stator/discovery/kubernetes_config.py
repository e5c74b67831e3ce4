"""Settings of the Kubernetes backend."""

from typing import Annotated, ClassVar, Literal

from stator.config import Config, Setting

__all__ = ["KubernetesConfig"]


class KubernetesConfig(Config, frozen=True, kw_only=True):
    """Who this pod is, where the API server is, and how patient to be with it (`docs/kubernetes.md`)."""

    section: ClassVar[str] = "kubernetes"
    location: ClassVar[str] = "namespace"

    mode: Annotated[
        Literal["pod", "container"],
        Setting(
            doc="what an instance is: a pod, or a container of a pod that has several",
            dyn="DYN_KUBE_DISCOVERY_MODE",
            on_bad_dyn="error",
        ),
    ] = "pod"
    pod_name: Annotated[
        str, Setting(doc="name of this pod; the file pod_name in podinfo wins. Empty: only list and watch", dyn="POD_NAME")
    ] = ""
    pod_uid: Annotated[str, Setting(doc="uid of this pod; the file pod_uid in podinfo wins", dyn="POD_UID")] = ""
    namespace: Annotated[
        str,
        Setting(
            doc="Kubernetes namespace of the cluster of processes; the file pod_namespace in podinfo wins. "
            "Empty: the service account's, else the kubeconfig's, else default",
            dyn="POD_NAMESPACE",
        ),
    ] = ""
    container: Annotated[
        str, Setting(doc="name of this container; needed in container mode, unused in pod mode", dyn="CONTAINER_NAME")
    ] = ""
    podinfo: Annotated[str, Setting(doc="directory of a downward API volume; empty: none is looked for")] = "/etc/podinfo"
    kubeconfig: Annotated[
        str,
        Setting(
            doc="kubeconfig files, separated by colons; empty: the service account of the pod, else ~/.kube/config",
            dyn="KUBECONFIG",
        ),
    ] = ""
    host: Annotated[
        str, Setting(doc="API server inside a cluster; Kubernetes itself sets it", dyn="KUBERNETES_SERVICE_HOST")
    ] = ""
    port: Annotated[
        int, Setting(doc="port of the API server inside a cluster", dyn="KUBERNETES_SERVICE_PORT", ge=1, le=65535)
    ] = 443
    service_account: Annotated[str, Setting(doc="directory with token, ca.crt and namespace of the service account")] = (
        "/var/run/secrets/kubernetes.io/serviceaccount"
    )
    debounce: Annotated[
        float, Setting(doc="changes are collected this long before watches are told. The reference's is 0.5", unit="s", ge=0)
    ] = 0.5
    page: Annotated[int, Setting(doc="objects per answer of a list", ge=1, le=10_000)] = 500
    watch_timeout: Annotated[int, Setting(doc="the API server ends a watch after this time; it is resumed", unit="s", ge=1)] = (
        290
    )
    silence: Annotated[
        float,
        Setting(
            doc="a watch that says nothing for this long, bookmarks included, is resumed on a new connection", unit="s", gt=0
        ),
    ] = 90.0
    answer_timeout: Annotated[
        float,
        Setting(doc="wait for an answer; after it a registration fails and lists answer what is known", unit="s", gt=0),
    ] = 5.0
