"""What a cluster lacks to run recipes, each with its remedy."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.table import Table

from components.core.base.errors import ClusterError
from components.core.base.kubernetes_api import kubernetes_errors, load_cluster
from pipelines.recipe.pod_settings import SETTINGS_CONFIG_MAP, STORE_KEYS, STORE_SECRET
from pipelines.run.cluster_queues import KUEUE, read_pools
from pipelines.run.kfp_server import KfpServer

MIN_KUBERNETES = (1, 34)
SERVICE_ACCOUNT = "tessera-pipelines"
"""The chart's account for the pods of pipelines."""
POOLS = ("cpu", "gpu")
"""Node pools of stages that name none."""
RETRY_DEFAULTS = {"spec": {"templateDefaults": {"retryStrategy": {"limit": "0", "retryPolicy": "Always"}}}}
"""`workflowDefaults` of Argo's config map.

Argo calls it an error, not a failure, where a pod is evicted and gone before Argo has seen how it ended, or is ended
before its container starts. The retries of Kubeflow Pipelines are for failures, and their number is all that its API
lets a pipeline say. What has no retries of its own gets none by this.
"""
ARGO_CONFIG_MAP, KFP_NAMESPACE = "workflow-controller-configmap", "kubeflow"
CHART = "install the chart helm/tessera in the namespace"
KUBEFLOW = "kubeflow.org"
API_GROUPS: Mapping[str, tuple[str, str]] = {
    "argoproj.io": ("Argo Workflows", "install Kubeflow Pipelines 2.17, which brings it"),
    KUEUE: ("Kueue", "install Kueue 0.15 or later"),
    "jobset.x-k8s.io": ("JobSet", "install Kubeflow Trainer v2, which brings it"),
    f"trainer.{KUBEFLOW}": ("Kubeflow Trainer", "install Kubeflow Trainer v2; stages of one pod need none"),
}
"""What serves each group of APIs, and where it comes from."""
RIGHTS = (
    (f"pipelines.{KUBEFLOW}", "runs", "create"),
    ("", "pods/log", "get"),
    (KUEUE, "localqueues", "list"),
    (f"trainer.{KUBEFLOW}", "trainjobs", "get"),
)
"""What a user does in the namespace: group, resource and verb."""


class Check(NamedTuple):
    """One line for the user; `passed` is None where it cannot be told, `remedy` is empty where nothing is to do."""

    name: str
    passed: bool | None
    found: str
    remedy: str = ""


def check_cluster(namespace: str, kfp_url: str | None) -> Iterator[Check]:
    """Look at everything that a run needs.

    Args:
        namespace: of the pods.
        kfp_url: address of Kubeflow Pipelines, None for that of the cluster.

    Raises:
        ClusterError: no cluster is configured, or it does not answer.
    """
    from kubernetes import client

    load_cluster()
    with kubernetes_errors():
        version = client.VersionApi().get_code()
        groups = {group.name for group in client.ApisApi().get_api_versions().groups}
    number = (int(version.major), int("".join(filter(str.isdigit, version.minor))))
    upgrade = "" if number >= MIN_KUBERNETES else "upgrade to Kubernetes 1.34 or later"
    yield Check("Kubernetes", not upgrade, version.git_version, upgrade)
    for group, (what, remedy) in API_GROUPS.items():
        yield Check(what, True, group) if group in groups else Check(what, False, "not installed", remedy)
    yield _check_kfp(kfp_url, namespace)
    yield _check_argo()
    if KUEUE in groups:
        yield from _check_pools(namespace)
    core = client.CoreV1Api()
    yield _check_object("service account", SERVICE_ACCOUNT, (), core.read_namespaced_service_account, namespace)
    yield _check_object("config map", SETTINGS_CONFIG_MAP, (), core.read_namespaced_config_map, namespace)
    yield _check_object("secret", STORE_SECRET, STORE_KEYS, core.read_namespaced_secret, namespace)
    for right in RIGHTS:
        yield _check_right(*right, namespace)


def _check_kfp(url: str | None, namespace: str) -> Check:
    """Whether Kubeflow Pipelines answers."""
    try:
        return Check("Kubeflow Pipelines", True, f"answers at {KfpServer(url, namespace).url}")
    except ClusterError as error:
        return Check("Kubeflow Pipelines", False, error.message, error.hint or "see its logs")


def _check_argo() -> Check:
    """Whether Argo tries pods again that were evicted, drained or preempted."""
    from kubernetes import client

    what, remedy = "retries of evicted pods", f"merge into its workflowDefaults: {json.dumps(RETRY_DEFAULTS)}"
    try:
        found = client.CoreV1Api().read_namespaced_config_map(ARGO_CONFIG_MAP, KFP_NAMESPACE).data or {}
    except client.ApiException as error:
        return Check(what, None, f"config map {ARGO_CONFIG_MAP} not readable: {error.reason}", remedy)
    defaults = yaml.safe_load(found.get("workflowDefaults", "")) or {}
    policy = defaults.get("spec", {}).get("templateDefaults", {}).get("retryStrategy", {}).get("retryPolicy")
    if policy == "Always":
        return Check(what, True, f"retryPolicy Always in {ARGO_CONFIG_MAP}")
    return Check(what, False, f"retryPolicy {policy or 'OnFailure'} in {ARGO_CONFIG_MAP}", remedy)


def _check_pools(namespace: str) -> Iterator[Check]:
    """The queues of the namespace, with their quotas and GPUs."""
    try:
        pools = read_pools(namespace)
    except ClusterError as error:
        yield Check("node pools", None, error.message, "ask for the right to list localqueues and clusterqueues")
        return
    for name in sorted({*pools, *POOLS}):
        if (pool := pools.get(name)) is None:
            yield Check(f"node pool {name}", False, "no local queue of this name", CHART)
        elif not pool.groups:
            yield Check(f"node pool {name}", False, f"no cluster queue {pool.cluster_queue}", CHART)
        else:
            no_gpus = name == "gpu" and not pool.gpus
            remedy = "give its cluster queue a flavor with a quota of nvidia.com/gpu" if no_gpus else ""
            yield Check(f"node pool {name}", not no_gpus, pool.describe(), remedy)


def _check_object(kind: str, name: str, keys: tuple[str, ...], read: Any, namespace: str) -> Check:
    """Whether the namespace has an object, with data for all keys."""
    from kubernetes.client import ApiException

    what = f"{kind} {name}"
    try:
        found = read(name, namespace)
    except ApiException as error:
        if error.status == 404 and name == STORE_SECRET:
            return Check(what, None, "not there: pods need a workload identity that may use the store", CHART)
        if error.status == 404:
            return Check(what, False, "not there", CHART)
        return Check(what, None, f"not readable: {error.reason}", f"ask an administrator of {namespace}")
    missing = [key for key in keys if key not in (found.data or {})]
    if missing:
        return Check(what, False, f"no {', '.join(missing)}", f"set it in the values of the chart, or in the {kind}")
    return Check(what, True, "there")


def _check_right(group: str, resource: str, verb: str, namespace: str) -> Check:
    """Whether you may do something in the namespace."""
    from kubernetes import client

    name, _, sub = resource.partition("/")
    asked = client.V1ResourceAttributes(
        group=group, resource=name, subresource=sub or None, verb=verb, namespace=namespace
    )
    review = client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=asked))
    with kubernetes_errors():
        answer = client.AuthorizationV1Api().create_self_subject_access_review(review)
    allowed = bool(answer.status.allowed)
    remedy = "" if allowed else f"ask for the role kubeflow-edit in {namespace}"
    return Check(f"right to {verb} {resource}", allowed, "yes" if allowed else "no", remedy)


def show_checks(checks: list[Check], console: Console) -> None:
    """Print a table of all checks."""
    table = Table("", "what", "found", "remedy")
    for check in checks:
        mark = {True: "[green]✓", False: "[red]✗", None: "[yellow]?"}[check.passed]
        table.add_row(mark, check.name, check.found, check.remedy)
    console.print(table)
