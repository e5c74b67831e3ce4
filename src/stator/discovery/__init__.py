"""Discovery: who is there. One interface (`Discovery`) over backends; records and keys are `stator.protocol.records`'."""

from stator.discovery.etcd import EtcdConfig, EtcdDiscovery, open_etcd
from stator.discovery.file import FileDiscovery, open_file
from stator.discovery.file_config import FileDiscoveryConfig
from stator.discovery.interface import (
    Added,
    Change,
    Discovery,
    DiscoveryFactory,
    DiscoveryStatus,
    Removed,
    Watch,
)
from stator.discovery.kubernetes import KubernetesConfig, KubernetesDiscovery, open_kubernetes
from stator.discovery.memory import MemoryDiscovery, MemoryDiscoveryConfig, MemoryStore, open_memory

__all__ = [
    "Added",
    "Change",
    "Discovery",
    "DiscoveryFactory",
    "DiscoveryStatus",
    "EtcdConfig",
    "EtcdDiscovery",
    "FileDiscovery",
    "FileDiscoveryConfig",
    "KubernetesConfig",
    "KubernetesDiscovery",
    "MemoryDiscovery",
    "MemoryDiscoveryConfig",
    "MemoryStore",
    "Removed",
    "Watch",
    "open_etcd",
    "open_file",
    "open_kubernetes",
    "open_memory",
]
