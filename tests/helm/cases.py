"""Values to render the chart with, and how its objects are found."""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from infra.chart import CHART

Object = dict[str, Any]
NAMESPACE = "runs"
CLUSTER_SCOPED = {
    "ClusterQueue",
    "CustomResourceDefinition",
    "Namespace",
    "PriorityClass",
    "ResourceFlavor",
    "WorkloadPriorityClass",
}
EXAMPLES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted((CHART / "ci").glob("*.yaml"))}


ON_CPUS: Object = {
    "digest": "a" * 64,
    "gpus": 0,
    "resources": {"requests": {"cpu": 1, "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
    "thinking": "off",
    "extraArgs": ["--seed=1"],
    "apiKeySecret": "clients",
    "cache": {"claim": "models"},
    "autoscaling": {"maxReplicas": 5},
}


def everything() -> Object:
    """The small cluster with monitoring, the operator, a model on CPUs, and accounts with annotations."""
    values: Object = deepcopy(EXAMPLES["small"])
    values["monitoring"] = {"enabled": True, "labels": {"release": "prometheus"}}
    values["network"] |= {"servingClients": ["gateway"]}
    values["images"] = {"pullSecrets": ["registry"]}
    values["pipelines"] = {"environment": {"HTTPS_PROXY": "http://proxy:3128"}}
    values["serving"] = {"serviceAccountAnnotations": {"a": "b"}, "rollouts": False, "models": {"nano": ON_CPUS}}
    values["embedded"]["storageClass"] = "fast"
    platform = {"url": "https://git.example.com/team/platform.git", "host": "gitea", "existingSecret": "platform-git"}
    values["operator"] = {
        "enabled": True,
        "serviceAccountAnnotations": {"a": "b"},
        "repositories": {"platform": platform, "public": {"url": "https://github.com/team/models"}},
        "signingSecret": "signing",
        "alertmanager": "http://alertmanager.monitoring:9093",
    }
    return values


CASES: dict[str, Object] = {"default": {}, **EXAMPLES, "everything": everything()}


def find(objects: list[Object], kind: str, name: str) -> Object:
    """The one object of a kind and a name."""
    (found,) = (one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name))
    return found


def pod_templates(objects: list[Object]) -> list[Object]:
    """Every pod template, wherever it is in an object."""

    def search(node: object) -> list[Object]:
        if isinstance(node, list):
            return [found for one in node for found in search(one)]
        if not isinstance(node, dict):
            return []
        here = [node] if "containers" in node.get("spec", {}) else []
        return here + [found for one in node.values() for found in search(one)]

    return search(objects)


def chart_copy(folder: Path) -> Path:
    """A copy of the chart to change."""
    return Path(shutil.copytree(CHART, folder / "tessera"))
