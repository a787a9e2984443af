"""What the node pools of a cluster have: Kueue's local queues of a namespace, and the quotas behind them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from components.core.base.errors import ClusterError, InputError
from components.core.base.kubernetes_api import api_client
from components.core.runtime.placement import Placement
from pipelines.recipe.graph import Graph
from pipelines.recipe.pod_settings import GPU, node_pool, requests

KUEUE = "kueue.x-k8s.io"
WAIT_CONTAINER = {"cpu": 0.01, "memory": 32.0 * 2**20}
"""What Argo's second container of a task's pod asks for; a quota counts all containers."""

Quota = dict[str, float]
"""Amount by Kubernetes' name of the resource; memory in bytes."""


@dataclass(frozen=True)
class Pool:
    """A node pool: a local queue, and for each flavor of its cluster queue what one stage can get at most.

    Attributes:
        name: of the local queue.
        cluster_queue: the queue that has the quotas.
        groups: of each resource group the quotas by flavor; a pod gets all resources of a group from one flavor.
    """

    name: str
    cluster_queue: str
    groups: tuple[Mapping[str, Quota], ...]

    @property
    def gpus(self) -> int:
        """GPUs of all flavors."""
        return int(sum(quota.get(GPU, 0.0) for group in self.groups for quota in group.values()))

    def lacks(self, asked: Quota) -> list[str]:
        """The resources of which no flavor has enough; those of a group that no single flavor fulfils."""
        lacking: list[str] = []
        covered: set[str] = set()
        for group in self.groups:
            names = {name for quota in group.values() for name in quota if name in asked}
            covered |= names
            if not any(all(quota.get(name, 0.0) >= asked[name] for name in names) for quota in group.values()):
                best = {name: max(quota.get(name, 0.0) for quota in group.values()) for name in names}
                lacking += [name for name in names if best[name] < asked[name]] or sorted(names)
        return sorted({*lacking, *(asked.keys() - covered)})

    def describe(self) -> str:
        """The quotas in words."""
        flavors = [
            f"{flavor} {show_amounts(quota)}" for group in self.groups for flavor, quota in group.items() if quota
        ]
        return "; ".join(flavors) or "nothing"


def show_amounts(amounts: Mapping[str, float]) -> str:
    """Amounts of resources in words, memory in GiB."""
    return ", ".join(
        f"{name} {value / 2**30:.4g} GiB" if name == "memory" else f"{name} {value:g}"
        for name, value in sorted(amounts.items())
    )


def read_pools(namespace: str) -> dict[str, Pool]:
    """The node pools that a namespace may use, by name; call `load_cluster` before it.

    Raises:
        ClusterError: Kueue is not there, or you may not read its queues.
    """
    from kubernetes import client

    with api_client() as connection:
        groups = client.ApisApi(connection).get_api_versions().groups
        versions = [group.preferred_version.version for group in groups if group.name == KUEUE]
        if not versions:
            raise ClusterError("the cluster has no Kueue", hint="install Kueue, or leave out --queues")
        api = client.CustomObjectsApi(connection)
        local = api.list_namespaced_custom_object(KUEUE, versions[0], namespace, "localqueues")["items"]
        cluster = api.list_cluster_custom_object(KUEUE, versions[0], "clusterqueues")["items"]
    by_name = {queue["metadata"]["name"]: queue for queue in cluster}
    pools: dict[str, Pool] = {}
    for queue in local:
        name, behind = queue["metadata"]["name"], queue["spec"]["clusterQueue"]
        groups_of_queue = _groups(by_name[behind], cluster) if behind in by_name else ()
        pools[name] = Pool(name, behind, tuple(groups_of_queue))
    return pools


def _groups(queue: Mapping[str, Any], others: list[dict[str, Any]]) -> Iterator[dict[str, Quota]]:
    """Quotas by flavor of each resource group, with what the queue may borrow from its cohort."""
    for group in queue["spec"].get("resourceGroups", ()):
        yield {
            flavor["name"]: {
                resource["name"]: _amount(resource["nominalQuota"])
                + _borrowable(queue, flavor["name"], resource, others)
                for resource in flavor["resources"]
            }
            for flavor in group["flavors"]
        }


def _borrowable(
    queue: Mapping[str, Any], flavor: str, resource: Mapping[str, Any], others: list[dict[str, Any]]
) -> float:
    """What the other queues of the cohort have of a resource, up to the queue's limit of borrowing."""
    cohort = _cohort(queue)
    if cohort is None:
        return 0.0
    lent = sum(
        _amount(each["nominalQuota"])
        for other in others
        if other["metadata"]["name"] != queue["metadata"]["name"] and _cohort(other) == cohort
        for group in other["spec"].get("resourceGroups", ())
        for own in group["flavors"]
        if own["name"] == flavor
        for each in own["resources"]
        if each["name"] == resource["name"]
    )
    limit = resource.get("borrowingLimit")
    return lent if limit is None else min(lent, _amount(limit))


def _cohort(queue: Mapping[str, Any]) -> str | None:
    """The cohort of a cluster queue, which Kueue's versions name differently."""
    spec = queue["spec"]
    cohort: str | None = spec.get("cohortName") or spec.get("cohort")
    return cohort


def _amount(quantity: str | int) -> float:
    """A quantity of Kubernetes as a number; memory in bytes."""
    from kubernetes.utils.quantity import parse_quantity

    return float(parse_quantity(quantity))


def _quota_of(placement: Placement) -> Quota:
    """What a stage takes of a quota; Kueue admits the nodes of a stage together, and to one flavor."""
    asked = requests(placement)
    if placement.nodes > 1:
        return {key: value * placement.nodes for key, value in asked.items()}
    return {key: value + WAIT_CONTAINER.get(key, 0.0) for key, value in asked.items()}


def refuse_large_stages(graph: Graph, pools: Mapping[str, Pool]) -> None:
    """Refuse a recipe with a stage that would wait forever.

    Raises:
        InputError: a stage names no pool of the cluster, or asks for more than its pool has.
    """
    faults: list[str] = []
    for task in graph.tasks:
        name = node_pool(task.placement)
        asked = _quota_of(task.placement)
        if name not in pools:
            faults.append(f"stage {task.label} runs in node pool {name!r}, and there is no queue of that name")
        elif lacking := pools[name].lacks(asked):
            wanted = show_amounts({key: asked[key] for key in lacking})
            faults.append(
                f"stage {task.label} asks for {wanted}; node pool {name} has at most {pools[name].describe()}"
            )
    if faults:
        known = ", ".join(sorted(pools)) or "none"
        raise InputError(
            "; ".join(faults),
            hint=f"change the stage's placement, or have the quota raised; node pools here: {known}",
        )
