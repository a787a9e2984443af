"""Objects that the cluster tests create, all of which Pod Security `restricted` lets in."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import certifi

from components.core.store.store import LOCAL_FOLDER
from infra.testcluster.images import HOST, NOBODY
from infra.testcluster.layout import POOL_LABEL
from infra.testcluster.manifests import KWOK_TAINT
from infra.testcluster.services import REAL_POOL

Object = dict[str, Any]
ROOT = Path(__file__).parents[2]
IMAGE = os.environ.get("TESSERA_TEST_IMAGE", HOST)
"""Image of test pods. The default is a skeleton that has Python through mounts of this machine's folders."""
PYTHON = sys.executable if IMAGE == HOST else "python"
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
GPU = "nvidia.com/gpu"
ENVIRONMENT = {"HOME": "/tmp", LOCAL_FOLDER: "/tmp/store"}
if IMAGE == HOST:
    ENVIRONMENT |= {
        "PYTHONPATH": str(ROOT),
        "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
        "SSL_CERT_FILE": certifi.where(),
    }
STANDIN = ("python", "-m", "tests.vllm_standin")
"""Command that takes the place of vLLM's."""
SMALL = {"cpu": "20m", "memory": "64Mi"}
"""The real node has two cores for all tests and for the cluster itself."""


def host_folders() -> dict[str, Path]:
    """Folders that a pod needs to run this project as it runs here, each mounted at its own path."""
    if IMAGE != HOST:
        return {}
    base = Path(sys.base_prefix)
    folders = {"usr": Path("/usr"), "environment": Path(sys.prefix), "python": base, "project": ROOT}
    return {name: path for name, path in folders.items() if name == "usr" or not path.is_relative_to("/usr")}


def host_mounts() -> list[Object]:
    """Mounts of the host's folders in a container."""
    return [{"name": name, "mountPath": str(path), "readOnly": True} for name, path in host_folders().items()]


def host_volumes() -> list[Object]:
    """The pod's volumes for `host_mounts`; the namespace has the claims of `volume_objects`."""
    return [{"name": name, "persistentVolumeClaim": {"claimName": name, "readOnly": True}} for name in host_folders()]


def volume_objects(namespace: str) -> list[Object]:
    """Volumes and claims for the host's folders.

    Pod Security `restricted` refuses a host path in a pod. It lets in a claim of a volume that an administrator made of
    one.
    """
    made: list[Object] = []
    for name, path in host_folders().items():
        shape = {"accessModes": ["ReadOnlyMany"], "storageClassName": ""}
        claim = {"namespace": namespace, "name": name}
        volume = {**shape, "capacity": {"storage": "1Gi"}, "hostPath": {"path": str(path)}, "claimRef": claim}
        wanted = {**shape, "volumeName": f"{namespace}-{name}", "resources": {"requests": {"storage": "1Gi"}}}
        made += [
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"{namespace}-{name}"},
                "spec": volume,
            },
            {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": claim, "spec": wanted},
        ]
    return made


def pod_spec(command: list[str], *, resources: dict[str, str] = SMALL, secret: str | None = None) -> Object:
    """A pod that runs one command once, with the host's folders and a place for temporary files."""
    container = {
        "name": "main",
        "image": IMAGE,
        "command": command,
        "env": [{"name": name, "value": value} for name, value in ENVIRONMENT.items()],
        "envFrom": [{"secretRef": {"name": secret}}] if secret else [],
        "resources": {"requests": resources, "limits": {key: resources[key] for key in (GPU,) if key in resources}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [*host_mounts(), {"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "restartPolicy": "Never",
        "securityContext": {"runAsNonRoot": True, "runAsUser": NOBODY, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [*host_volumes(), {"name": "tmp", "emptyDir": {}}],
    }


def pod(name: str, command: list[str], **settings: Any) -> Object:
    """A pod of `pod_spec`."""
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pod_spec(command, **settings)}


def queued_job(name: str, queue: str, command: list[str], *, priority: str | None = None, **settings: Any) -> Object:
    """A Job of one pod that Kueue admits."""
    labels = {QUEUE_LABEL: queue} | ({"kueue.x-k8s.io/priority-class": priority} if priority else {})
    spec = {"suspend": True, "backoffLimit": 0, "template": {"spec": pod_spec(command, **settings)}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name, "labels": labels}, "spec": spec}


def flavor(name: str, pool: str) -> Object:
    """Kueue's view of a node pool.

    Every flavor has the pool's label, because Kueue ignores the keys of a pod's node selector that its flavors lack.
    """
    tolerations = [] if pool == REAL_POOL else [{**KWOK_TAINT, "operator": "Equal"}]
    return {
        "apiVersion": "kueue.x-k8s.io/v1beta2",
        "kind": "ResourceFlavor",
        "metadata": {"name": name},
        "spec": {"nodeLabels": {POOL_LABEL: pool}, "tolerations": tolerations},
    }


def queues(name: str, namespace: str, quotas: dict[str, dict[str, str]], local: str = "main") -> list[Object]:
    """A ClusterQueue with a quota of each flavor, and the LocalQueue of a namespace."""
    resources = sorted({key for quota in quotas.values() for key in quota})
    flavors = [
        {"name": key, "resources": [{"name": each, "nominalQuota": quota[each]} for each in resources]}
        for key, quota in quotas.items()
    ]
    spec = {
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}},
        "preemption": {"withinClusterQueue": "LowerPriority"},
        "resourceGroups": [{"coveredResources": resources, "flavors": flavors}],
    }
    group = "kueue.x-k8s.io/v1beta2"
    return [
        {"apiVersion": group, "kind": "ClusterQueue", "metadata": {"name": name}, "spec": spec},
        {"apiVersion": group, "kind": "LocalQueue", "metadata": {"name": local}, "spec": {"clusterQueue": name}},
    ]


def run_on_this_machine(spec: Object, server: Sequence[str] | None = STANDIN) -> None:
    """Give a pod of the chart the image and the folders of this machine, and a server of a model another command."""
    spec["volumes"] += host_volumes()
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        if server and container["name"] == "server":
            container["command"] = list(server)
        probe = container.get("startupProbe", {}).get("exec", {})
        for command in (container["command"], probe.get("command", ["python"])):
            command[0] = PYTHON
        own = {one["name"] for one in container.get("env", [])}
        more = [{"name": name, "value": value} for name, value in ENVIRONMENT.items() if name not in own]
        container |= {"image": IMAGE, "env": [*container.get("env", []), *more]}
        container["volumeMounts"] += host_mounts()
        container["resources"]["requests"] = {"cpu": "20m", "memory": "64Mi"}
