"""What the pods of a stage ask of Kubernetes: resources, pool, volumes, and the environment that the chart provides.

kfp-kubernetes has no request for ephemeral storage, so the size limit of the volume bounds it, and no class of pod
priority, so Kueue's label gives it. Memory is requested and not limited: a node that runs out of it evicts first.
"""

from collections.abc import Mapping
from typing import Any

from components.core.base.config import canonical_json
from components.core.runtime.multi_node.train_job import CONTAINER, GROUP, MANIFEST, OWN_POD, VERSION
from components.core.runtime.placement import Placement
from components.core.runtime.stage_command import ALLOCATOR, METRICS_PORT
from components.core.store.store import LOCAL_FOLDER

SETTINGS_CONFIG_MAP = "tessera-settings"
"""Config map of the namespace; each of `SETTINGS` is a key of it, and an environment variable of every pod."""
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY")
SETTINGS = ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_REGION", METRICS_PORT, *PROXIES)
STORE_SECRET = "tessera-store"
"""Secret of the namespace with the keys of the store; absent where pods have a workload identity."""
STORE_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
MLFLOW_SECRET = "tessera-mlflow"
"""Secret of the namespace with what MLflow's server asks for; absent where it asks for nothing."""
MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
QUEUE_LABEL, PRIORITY_LABEL = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class"
POOL_LABEL = "tessera.dev/pool"
RUN_LABEL, STAGE_LABEL, RECIPE_LABEL = "tessera.dev/run", "tessera.dev/stage", "tessera.dev/recipe-digest"
GPU = "nvidia.com/gpu"
RUNTIME = "tessera-torch"
"""The chart's runtime of Kubeflow Trainer."""
PATCH_MANAGER = "tessera.dev/pipelines"
"""Trainer's name for whoever changes the runtime for a `TrainJob`."""
WATCHER, WATCHER_CPU = Placement(threads=1, memory_gib=1.0), "100m"
"""What the task asks for that watches the nodes of a stage."""
HOME = "/home/tessera"
"""An empty volume: home of the user, caches of libraries, working copies of the store."""
ENVIRONMENT = {"HOME": HOME, "USER": "tessera", LOCAL_FOLDER: f"{HOME}/store", **ALLOCATOR}
"""Of every pod. Without a user's name, torch asks for that of the user id, which an image need not have."""


def stage_label(label: str) -> str:
    """The label of a task as the value of a label of Kubernetes."""
    return label.replace("/", ".")


def node_pool(placement: Placement) -> str:
    """The queue of a stage: the pool that it names, else that of stages with GPUs, or of those without."""
    return placement.node_pool or ("gpu" if placement.gpus else "cpu")


def requests(placement: Placement) -> dict[str, float]:
    """What a node of a stage asks for, by Kubernetes' name of the resource; memory in bytes."""
    asked = {"cpu": float(placement.processes * placement.threads), "memory": placement.memory_gib * 2**30}
    return asked | ({GPU: float(placement.gpus)} if placement.gpus else {})


def set_up_pod(step: Any, placement: Placement, labels: Mapping[str, str], *, queues: bool) -> None:
    """Say what the pod of a KFP task asks of a cluster.

    The task of a stage of several nodes only watches them: its pod is small, and waits in no queue.

    Args:
        step: the KFP task.
        placement: of the stage.
        labels: of the pod.
        queues: whether Kueue admits the pod through the queue of its pool, and chooses the nodes.
    """
    from kfp import kubernetes
    from kfp.dsl.structures import ResourceSpec

    cpu, environment = str(placement.processes * placement.threads), dict(ENVIRONMENT)
    if placement.nodes > 1:
        manifest = train_job(placement, labels, step.container_spec.image, queues=queues)
        environment[MANIFEST] = canonical_json(manifest)
        for name, field in OWN_POD.items():
            kubernetes.use_field_path_as_env(step, name, field)
        cpu, placement, queues = WATCHER_CPU, WATCHER, False
    gpus = {"accelerator_type": GPU, "accelerator_count": str(placement.gpus)} if placement.gpus else {}
    # Each setter of a task reads the sources of the whole call stack again, a tenth of a second to a second.
    step.container_spec.env = environment
    step.container_spec.resources = ResourceSpec(cpu, memory_request=f"{placement.memory_gib:g}Gi", **gpus)
    for key, value in {**labels, **_queue_labels(placement, queues=queues)}.items():
        kubernetes.add_pod_label(step, key, value)
    for key, value in _node_selector(placement, queues=queues).items():
        kubernetes.add_node_selector(step, key, value)
    for toleration in _tolerations(placement):
        kubernetes.add_toleration(step, **toleration)
    kubernetes.set_security_context(step, run_as_non_root=True)
    # What the chart makes: nothing of it is needed for a pod to start.
    kubernetes.use_config_map_as_env(step, SETTINGS_CONFIG_MAP, {name: name for name in SETTINGS}, optional=True)
    for secret, keys in ((STORE_SECRET, STORE_KEYS), (MLFLOW_SECRET, MLFLOW_KEYS)):
        kubernetes.use_secret_as_env(step, secret, {name: name for name in keys}, optional=True)
    for name, (path, volume) in _volumes(placement).items():
        medium, size = volume.get("medium"), volume.get("sizeLimit")
        kubernetes.empty_dir_mount(step, name, path, medium=medium, size_limit=size)


def train_job(placement: Placement, labels: Mapping[str, str], image: str, *, queues: bool) -> dict[str, Any]:
    """The `TrainJob` of a stage of several nodes, without its name and command.

    What all pods have in common (account, security, environment, mounts) is in the chart's runtime.

    Args:
        placement: of the stage.
        labels: of the object and of its pods.
        image: of the stage.
        queues: whether Kueue admits the pods, all together, through the queue of their pool.
    """
    asked = {"cpu": str(placement.processes * placement.threads), "memory": f"{placement.memory_gib:g}Gi"}
    gpus = {GPU: str(placement.gpus)} if placement.gpus else {}
    pod: dict[str, Any] = {
        "nodeSelector": _node_selector(placement, queues=queues),
        "tolerations": _tolerations(placement),
        "volumes": [{"name": name, "emptyDir": volume} for name, (_, volume) in _volumes(placement).items() if volume],
    }
    template = {"metadata": {"labels": dict(labels)}, "spec": {key: value for key, value in pod.items() if value}}
    job = {"name": CONTAINER, "template": {"spec": {"template": template}}}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "TrainJob",
        "metadata": {"labels": {**labels, **_queue_labels(placement, queues=queues)}},
        "spec": {
            "runtimeRef": {"apiGroup": GROUP, "kind": "TrainingRuntime", "name": RUNTIME},
            "trainer": {
                "image": image,
                "numNodes": placement.nodes,
                "numProcPerNode": placement.processes,
                "resourcesPerNode": {"requests": {**asked, **gpus}, **({"limits": gpus} if gpus else {})},
                "env": [{"name": name, "value": value} for name, value in ALLOCATOR.items()],
            },
            "runtimePatches": [
                {"manager": PATCH_MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}
            ],
        },
    }


def _queue_labels(placement: Placement, *, queues: bool) -> dict[str, str]:
    """Kueue's labels: the queue of the stage's pool, and its priority."""
    labels = {QUEUE_LABEL: node_pool(placement)} if queues else {}
    return labels | ({PRIORITY_LABEL: placement.priority} if placement.priority is not None else {})


def _node_selector(placement: Placement, *, queues: bool) -> dict[str, str]:
    """Labels of the nodes of the stage's pool; none where Kueue chooses the nodes."""
    return {POOL_LABEL: placement.node_pool} if placement.node_pool is not None and not queues else {}


def _tolerations(placement: Placement) -> list[dict[str, str]]:
    """The taints that the stage's pods tolerate, those of GPU nodes among them."""
    taints = (*placement.tolerations, *([f"{GPU}:NoSchedule"] if placement.gpus else []))
    return [_toleration(taint) for taint in taints]


def _volumes(placement: Placement) -> dict[str, tuple[str, dict[str, str]]]:
    """The empty volumes of a pod by name: where each is mounted, and its `emptyDir`."""
    disk = {"sizeLimit": f"{placement.disk_gib:g}Gi"} if placement.disk_gib is not None else {}
    shared_memory = {"medium": "Memory", "sizeLimit": f"{placement.shared_memory_gib:g}Gi"}
    return {"home": (HOME, disk), "tmp": ("/tmp", {}), "shared-memory": ("/dev/shm", shared_memory)}


def _toleration(taint: str) -> dict[str, str]:
    """A taint as a toleration; kfp-kubernetes takes the same names as Kubernetes."""
    name, _, effect = taint.partition(":")
    key, equals, value = name.partition("=")
    matched = {"operator": "Equal", "value": value} if equals else {"operator": "Exists"}
    return {"key": key, **matched, **({"effect": effect} if effect else {})}
