"""The part of a cluster that makes pods ready: pods by name, and the EndpointSlices of a Service that selects them."""

from typing import Any

from stator.testing.kubernetes_store import PODS, SLICES, KubernetesStore

__all__ = ["LABELS", "Pods"]

LABELS = {"nvidia.com/dynamo-discovery-enabled": "true", "nvidia.com/dynamo-discovery-backend": "kubernetes"}
_PER_SLICE = 100
"""endpoints in one EndpointSlice, as real ones have them"""


class Pods:
    """Pods of one namespace behind one Service. Every change is in the store when a call returns."""

    def __init__(self, store: KubernetesStore, namespace: str, *, service: str = "workers") -> None:
        self.namespace = namespace
        self._store = store
        self._service = service
        self._ready: dict[str, dict[str, bool]] = {}
        self._slots: list[list[str]] = []
        """names of pods by slice"""

    def uid(self, name: str) -> str:
        """The uid of a pod."""
        return str(self._store.objects[(PODS.plural, self.namespace, name)]["metadata"]["uid"])

    def add(self, name: str, *containers: str, ready: bool = True) -> str:
        """Start a pod; without names it has one container, `main`. The answer is its uid."""
        self._ready[name] = dict.fromkeys(containers or ("main",), ready)
        place = next((slot for slot in self._slots if len(slot) < _PER_SLICE), None)
        if place is None:
            place = list[str]()
            self._slots.append(place)
        place.append(name)
        self._write_pod(name)
        self._write_slice(self._slots.index(place))
        return self.uid(name)

    def set_ready(self, name: str, ready: bool, *, container: str | None = None) -> None:
        """Let a pod, or one container of it, pass or fail its readiness probe."""
        states = self._ready[name]
        for each in states if container is None else (container,):
            states[each] = ready
        self._write_pod(name)
        self._write_slice(next(number for number, slot in enumerate(self._slots) if name in slot))

    def delete(self, name: str) -> None:
        """Delete a pod, and what it owns."""
        del self._ready[name]
        for number, slot in enumerate(self._slots):
            if name in slot:
                slot.remove(name)
                self._write_slice(number)
        self._store.delete(PODS.plural, self.namespace, name)

    def forget(self) -> None:
        """There are no pods, and never were."""
        self._ready.clear()
        self._slots.clear()

    def _write_pod(self, name: str) -> None:
        states = self._ready[name]
        statuses = [{"name": container, "ready": ready, "restartCount": 0} for container, ready in states.items()]
        spec = {"containers": [{"name": container} for container in states]}
        metadata: dict[str, Any] = {"name": name, "labels": dict(LABELS)}
        self._store.put(
            PODS,
            self.namespace,
            {"metadata": metadata, "spec": spec, "status": {"phase": "Running", "containerStatuses": statuses}},
        )

    def _write_slice(self, number: int) -> None:
        endpoints: list[dict[str, Any]] = []
        for name in self._slots[number]:
            ready = all(self._ready[name].values())
            endpoints.append(
                {
                    "addresses": ["192.0.2.1"],
                    "conditions": {"ready": ready, "serving": ready, "terminating": False},
                    "targetRef": {"kind": "Pod", "namespace": self.namespace, "name": name, "uid": self.uid(name)},
                }
            )
        metadata = {
            "name": f"{self._service}-{number:05d}",
            "labels": {**LABELS, "kubernetes.io/service-name": self._service},
        }
        ports = [{"name": "status", "port": 9090, "protocol": "TCP"}]
        self._store.put(
            SLICES, self.namespace, {"metadata": metadata, "addressType": "IPv4", "endpoints": endpoints, "ports": ports}
        )
