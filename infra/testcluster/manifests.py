"""Objects that the controllers need, changed so that the API server reaches controllers that are host processes."""

import base64
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

from infra.testcluster.build import MODULE_SETS, module_set
from infra.testcluster.layout import POOL_LABEL, Layout, TestClusterError

Object = dict[str, Any]
LEFT_OUT = {
    *("Deployment", "Service", "APIService", "ServiceMonitor", "Certificate", "Issuer", "Secret", "ConfigMap"),
    *("ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"),
}
"""Kinds that run a controller as a pod, or expose it, or refuse changes of its definitions."""
KWOK_NODES = "type=kwok"
KWOK_TAINT = {"key": "kwok.x-k8s.io/node", "value": "fake", "effect": "NoSchedule"}
_ORDER = {"Namespace": 0, "CustomResourceDefinition": 1}


class Controller(BaseModel):
    """A controller whose objects come from its Go module."""

    model_config = ConfigDict(frozen=True)

    name: str
    """Name of the service and of its copied manifests."""
    modules: str
    """The module set that has both, see `build.MODULE_SETS`."""
    folders: tuple[str, ...]
    """Kustomizations, or folders of plain files, below the copied manifests."""
    webhook_port: int = 0
    namespace: str = ""
    """A namespace that the folders do not make themselves."""
    unused_webhooks: tuple[str, ...] = ()
    """Parts of names of webhooks for kinds that the cluster does not have."""


class NodePool(BaseModel):
    """Simulated GPU nodes of one kind; pods on them succeed without running anything."""

    model_config = ConfigDict(frozen=True)

    name: str
    nodes: int
    gpus_per_node: int
    gpu_product: str


JOBSET = Controller(name="jobset", modules="ctrl", folders=("default",), webhook_port=9444)
TRAINER = Controller(
    name="trainer",
    modules="trainer",
    folders=("base/crds", "base/webhook"),
    webhook_port=9445,
    namespace="kubeflow-system",
)
KUEUE = Controller(
    name="kueue",
    modules="ctrl",
    folders=("default",),
    webhook_port=9443,
    unused_webhooks=(
        "appwrapper",
        "jaxjob",
        "leaderworkerset",
        "mpijob",
        "paddle",
        "pytorch",
        "ray",
        "spark",
        "tfjob",
        "xgboost",
    ),
)
ARGO = Controller(name="argo", modules="argo", folders=("",))
ROLLOUTS = Controller(name="rollouts", modules="rollouts", folders=("",))
FLUX = tuple(
    Controller(name=name, modules="flux", folders=("",))
    for name in ("source-controller", "kustomize-controller", "helm-controller")
)
GATEWAY_API = Controller(name="gateway", modules="gateway", folders=("",))
NODE_POOLS = (
    NodePool(name="h100", nodes=4, gpus_per_node=8, gpu_product="NVIDIA-H100-80GB-HBM3"),
    NodePool(name="l40s", nodes=2, gpus_per_node=4, gpu_product="NVIDIA-L40S"),
)
KWOK_STAGES = (
    "node/fast/node-initialize.yaml",
    "node/heartbeat-with-lease/node-heartbeat-with-lease.yaml",
    "pod/fast/pod-ready.yaml",
    "pod/fast/pod-complete.yaml",
    "pod/fast/pod-delete.yaml",
)


def objects_file(controller: Controller, layout: Layout) -> Path:
    """Where the controller's objects without its webhook configurations are."""
    return layout.manifests / f"{controller.name}.yaml"


def webhooks_file(controller: Controller, layout: Layout) -> Path:
    """Where its webhook configurations are; they are applied when the controller answers, else they block every pod."""
    return layout.manifests / f"{controller.name}-webhooks.yaml"


def write_manifests(controllers: Iterable[Controller], layout: Layout) -> None:
    """Write the objects of the controllers."""
    layout.manifests.mkdir(parents=True, exist_ok=True)
    authority = (layout.certificates / "ca.crt").read_bytes()
    for controller in controllers:
        source = copied_folder(controller.name, layout)
        marker = layout.manifests / f"{controller.name}.source"
        if marker.exists() and marker.read_text() == str(source):
            continue
        objects = host_objects(_read_objects(controller, source, layout), controller, authority)
        webhooks = [found for found in objects if found["kind"].endswith("WebhookConfiguration")]
        others = [found for found in objects if found not in webhooks]
        objects_file(controller, layout).write_text(yaml.safe_dump_all(others, sort_keys=False))
        webhooks_file(controller, layout).write_text(yaml.safe_dump_all(webhooks, sort_keys=False))
        marker.write_text(str(source))


def host_objects(objects: Iterable[Object], controller: Controller, authority: bytes) -> list[Object]:
    """Change a controller's objects so that the API server calls the controller at an address instead of a Service."""
    kept = [found for found in objects if found["kind"] not in LEFT_OUT]
    for found in kept:
        if found["kind"].endswith("WebhookConfiguration"):
            used = [hook for hook in found.get("webhooks", []) if not _any_in(controller.unused_webhooks, hook["name"])]
            found["webhooks"] = [
                {**hook, "clientConfig": _by_url(hook["clientConfig"], controller, authority)} for hook in used
            ]
        conversion = found.get("spec", {}).get("conversion", {}) if found["kind"] == "CustomResourceDefinition" else {}
        if "webhook" in conversion:
            client = conversion["webhook"].get("clientConfig", {})
            conversion["webhook"]["clientConfig"] = _by_url(client, controller, authority)
    if controller.namespace:
        kept.append({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": controller.namespace}})
    return sorted(kept, key=lambda found: _ORDER.get(found["kind"], 2))


def simulated_nodes(pools: Iterable[NodePool]) -> Iterator[Object]:
    """The nodes of all pools; every node carries the label of its pool, as real ones do."""
    for pool in pools:
        capacity = {
            "cpu": "96",
            "memory": "1Ti",
            "ephemeral-storage": "1Ti",
            "pods": "110",
            "nvidia.com/gpu": str(pool.gpus_per_node),
        }
        for number in range(pool.nodes):
            name = f"{pool.name}-{number}"
            labels = {
                "type": "kwok",
                POOL_LABEL: pool.name,
                "kubernetes.io/arch": "amd64",
                "kubernetes.io/os": "linux",
                "kubernetes.io/hostname": name,
                "nvidia.com/gpu.product": pool.gpu_product,
            }
            yield {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "labels": labels, "annotations": {"kwok.x-k8s.io/node": "fake"}},
                "spec": {"taints": [KWOK_TAINT]},
                "status": {"capacity": capacity, "allocatable": capacity},
            }


def copied_folder(name: str, layout: Layout) -> Path:
    """The folder into which the build copied a module's manifests."""
    return next(found for found in MODULE_SETS if name in found.manifests).folder(layout) / "manifests" / name


def _read_objects(controller: Controller, source: Path, layout: Layout) -> Iterator[Object]:
    for folder in controller.folders:
        command = [str(module_set("kube").folder(layout) / "kubectl"), "kustomize", str(source / folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise TestClusterError(f"the manifests of {controller.name} cannot be read: {done.stderr.strip()}")
        yield from (found for found in yaml.load_all(done.stdout, yaml.CSafeLoader) if found)


def _by_url(client: Object, controller: Controller, authority: bytes) -> Object:
    if "service" not in client:
        return client
    url = f"https://127.0.0.1:{controller.webhook_port}{client['service'].get('path', '/')}"
    return {"url": url, "caBundle": base64.b64encode(authority).decode()}


def _any_in(parts: Iterable[str], text: str) -> bool:
    return any(part in text for part in parts)
