"""What the node pools of a cluster have, and recipes that ask for more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from components.core.base.errors import ClusterError, InputError
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import load_recipe
from pipelines.run.cluster_queues import Pool, read_pools, refuse_large_stages
from tests.pipelines.run.fake_kubernetes import FakeKubernetes, flavors, running_kubernetes

GIB = 2.0**30


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    from kubernetes import config

    with running_kubernetes(tmp_path) as (fake, path):
        config.load_kube_config(str(path))
        yield fake


def test_quotas_are_read_by_flavor_with_what_a_queue_may_borrow(kubernetes: FakeKubernetes) -> None:
    kubernetes.groups("kueue.x-k8s.io")
    lending = flavors(h100={"cpu": 10, "memory": "100Gi", "nvidia.com/gpu": 4}, spot={"cpu": 99})
    own = flavors(h100={"cpu": "1500m", "memory": "2Gi", "nvidia.com/gpu": 2})
    own["resourceGroups"][0]["flavors"][0]["resources"][0]["borrowingLimit"] = "500m"
    alone = flavors(cpu={"cpu": 3, "memory": "512Mi"})
    kubernetes.queues(
        "team",
        {"gpu": "training", "cpu": "small", "lost": "gone"},
        {"training": own | {"cohortName": "all"}, "other": lending | {"cohortName": "all"}, "small": alone},
    )
    pools = read_pools("team")
    assert pools["gpu"].groups == ({"h100": {"cpu": 2.0, "memory": 102 * GIB, "nvidia.com/gpu": 6.0}},)
    assert pools["gpu"].gpus == 6
    assert pools["cpu"].groups == ({"cpu": {"cpu": 3.0, "memory": GIB / 2}},)
    assert pools["lost"].groups == ()


def test_a_cluster_without_kueue_or_rights_says_so(kubernetes: FakeKubernetes) -> None:
    kubernetes.groups("argoproj.io")
    with pytest.raises(ClusterError, match="has no Kueue"):
        read_pools("team")
    kubernetes.groups("kueue.x-k8s.io")
    kubernetes.queues("team", {}, {})
    kubernetes.answers["/apis/kueue.x-k8s.io/v1beta2/clusterqueues"] = None
    with pytest.raises(ClusterError, match="answered 403"):
        read_pools("team")


@pytest.mark.parametrize(
    ("asked", "lacking"),
    [
        ({"cpu": 4.0}, []),
        ({"cpu": 9.0}, ["cpu"]),
        ({"cpu": 4.0, "memory": 8 * GIB}, ["cpu", "memory"]),  # each fits one flavor, no flavor fits both
        ({"nvidia.com/gpu": 1.0}, ["nvidia.com/gpu"]),
    ],
)
def test_a_pod_gets_all_resources_of_a_group_from_one_flavor(asked: dict[str, float], lacking: list[str]) -> None:
    quotas = {"fast": {"cpu": 4.0, "memory": GIB}, "large": {"cpu": 1.0, "memory": 8 * GIB}}
    assert Pool("cpu", "cpu", (quotas,)).lacks(asked) == lacking


def test_a_recipe_that_asks_for_more_than_its_pool_has_is_refused_with_the_numbers(only_data: Path) -> None:
    pools = {"cpu": Pool("cpu", "cpu", ({"small": {"cpu": 2.1, "memory": 3 * GIB}},))}
    fits = llama_nemotron(load_recipe(only_data, ["placement={threads: 2, memory_gib: 2}"]))
    refuse_large_stages(fits, pools)

    for setting, asked in (
        ("threads: 3, memory_gib: 1", "cpu 3.01"),
        ("threads: 1, memory_gib: 3", "memory 3.031 GiB"),
    ):
        large = llama_nemotron(load_recipe(only_data, [f"placement={{{setting}}}"]))
        with pytest.raises(InputError) as caught:
            refuse_large_stages(large, pools)
        expected = f"stage data asks for {asked}; node pool cpu has at most small cpu 2.1, memory 3 GiB"
        assert caught.value.message == expected

    elsewhere = llama_nemotron(load_recipe(only_data, ["placement={node_pool: tpu}"]))
    with pytest.raises(InputError, match="node pool 'tpu', and there is no queue") as caught:
        refuse_large_stages(elsewhere, pools)
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("node pools here: cpu")


def test_the_nodes_of_a_stage_have_to_fit_together(only_data: Path) -> None:
    nodes = llama_nemotron(load_recipe(only_data, ["placement={nodes: 3, threads: 2, memory_gib: 2}"]))
    refuse_large_stages(nodes, {"cpu": Pool("cpu", "cpu", ({"all": {"cpu": 6.0, "memory": 6 * GIB}},))})
    with pytest.raises(InputError, match=r"^stage data asks for cpu 6; node pool cpu has at most small cpu 5.9, "):
        refuse_large_stages(nodes, {"cpu": Pool("cpu", "cpu", ({"small": {"cpu": 5.9, "memory": 9 * GIB}},))})
