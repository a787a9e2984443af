"""What the pod of a stage asks of Kubernetes: resources, pool, volumes, and the environment that the chart provides.

kfp-kubernetes has no request for ephemeral storage, so the size limit of the volume bounds it, and no class of pod
priority, so Kueue's label gives it. Memory is requested and not limited: a node that runs out of it evicts first.
"""

from collections.abc import Mapping
from typing import Any

from components.core.runtime.placement import Placement
from components.core.runtime.stage_command import ALLOCATOR
from components.core.store.store import LOCAL_FOLDER

SETTINGS_CONFIG_MAP = "tessera-settings"
"""Config map of the namespace; each of `SETTINGS` is a key of it, and an environment variable of every pod."""
SETTINGS = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_REGION")
STORE_SECRET = "tessera-store"
"""Secret of the namespace with the keys of the store; absent where pods have a workload identity."""
STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
POOL_LABEL = "tessera.dev/pool"
GPU = "nvidia.com/gpu"
HOME = "/home/tessera"
"""An empty volume: home of the user, caches of libraries, working copies of the store."""


def node_pool(placement: Placement) -> str:
    """The queue of a stage: the pool that it names, else that of stages with GPUs, or of those without."""
    return placement.node_pool or ("gpu" if placement.gpus else "cpu")


def requests(placement: Placement) -> dict[str, float]:
    """What a stage asks for, by Kubernetes' name of the resource; memory in bytes."""
    asked = {"cpu": float(placement.processes * placement.threads), "memory": placement.memory_gib * 2**30}
    return asked | ({GPU: float(placement.gpus)} if placement.gpus else {})


def set_up_pod(step: Any, placement: Placement, labels: Mapping[str, str], *, queues: bool) -> None:
    """Say what the pod of a KFP task asks of a cluster.

    Args:
        step: the KFP task.
        placement: of the stage.
        labels: of the pod.
        queues: whether Kueue admits the pod through the queue of its pool, and chooses the nodes.
    """
    from kfp import kubernetes

    step.set_cpu_request(str(placement.processes * placement.threads))
    step.set_memory_request(f"{placement.memory_gib:g}Gi")
    if placement.gpus:
        step.set_accelerator_type(GPU).set_accelerator_limit(placement.gpus)
    own = {QUEUE_LABEL: node_pool(placement)} if queues else {}
    if placement.priority is not None:
        own[PRIORITY_LABEL] = placement.priority
    for key, value in {**labels, **own}.items():
        kubernetes.add_pod_label(step, key, value)
    if placement.node_pool is not None and not queues:
        kubernetes.add_node_selector(step, POOL_LABEL, placement.node_pool)
    for taint in (*placement.tolerations, *([f"{GPU}:NoSchedule"] if placement.gpus else [])):
        kubernetes.add_toleration(step, **_toleration(taint))
    kubernetes.set_security_context(step, run_as_non_root=True)
    _set_environment(step)
    disk = f"{placement.disk_gib:g}Gi" if placement.disk_gib is not None else None
    kubernetes.empty_dir_mount(step, "home", HOME, size_limit=disk)
    kubernetes.empty_dir_mount(step, "tmp", "/tmp")
    shared_memory = f"{placement.shared_memory_gib:g}Gi"
    kubernetes.empty_dir_mount(step, "shared-memory", "/dev/shm", medium="Memory", size_limit=shared_memory)


def _set_environment(step: Any) -> None:
    """Point the pod to its volumes, and to what the chart made; nothing of the latter is needed for a pod to start."""
    from kfp import kubernetes

    # Without a user's name, torch asks for that of the user id, which an image need not have.
    for name, value in {"HOME": HOME, "USER": "tessera", LOCAL_FOLDER: f"{HOME}/store", **ALLOCATOR}.items():
        step.set_env_variable(name, value)
    kubernetes.use_config_map_as_env(step, SETTINGS_CONFIG_MAP, {name: name for name in SETTINGS}, optional=True)
    kubernetes.use_secret_as_env(step, STORE_SECRET, {name: name for name in STORE_KEYS}, optional=True)


def _toleration(taint: str) -> dict[str, str]:
    """The arguments of kfp-kubernetes for a taint."""
    name, _, effect = taint.partition(":")
    key, equals, value = name.partition("=")
    matched = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": key, **matched, **({"effect": effect} if effect else {})}
