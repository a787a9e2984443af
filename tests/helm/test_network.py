"""What the network policies let through, by an evaluator of their rules."""

import ipaddress
from typing import Any

import pytest

from infra.chart import render
from tests.helm.cases import CASES, EXAMPLES, Object, find

RUNS = "tessera-runs"
STAGE = {"tessera.dev/stage": "sft", "tessera.dev/run": "r", "pipelines.kubeflow.org/v2_component": "true"}
DRIVER = {"pipelines.kubeflow.org/v2_component": "true"}
OTHER = {"app": "other"}


def ours(component: str) -> dict[str, str]:
    """Labels of a pod of the chart."""
    return {
        "app.kubernetes.io/name": "tessera",
        "app.kubernetes.io/instance": "tessera",
        "app.kubernetes.io/component": component,
    }


def selected(selector: Object, labels: dict[str, str]) -> bool:
    wanted = selector.get("matchLabels", {})
    expressions = selector.get("matchExpressions", [])
    return labels.items() >= wanted.items() and all(fulfils(one, labels) for one in expressions)


def fulfils(expression: Object, labels: dict[str, str]) -> bool:
    if expression["operator"] == "NotIn":
        return labels.get(expression["key"]) not in expression["values"]
    assert expression["operator"] == "Exists"
    return expression["key"] in labels


def matches(peer: Object, namespace: str | None, labels: dict[str, str], address: str | None) -> bool:
    """Whether a peer of a rule is a pod (namespace and labels) or an address outside the cluster."""
    if "ipBlock" in peer:
        network = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return address is not None and ipaddress.ip_address(address) in network
    if namespace is None:
        return False
    if "namespaceSelector" in peer:
        inside = selected(peer["namespaceSelector"], {"kubernetes.io/metadata.name": namespace})
    else:
        inside = namespace == RUNS
    return inside and selected(peer.get("podSelector", {}), labels)


def passes(
    objects: list[Object],
    direction: str,
    pod: dict[str, str],
    port: int,
    *,
    protocol: str = "TCP",
    namespace: str | None = RUNS,
    labels: dict[str, str] | None = None,
    address: str | None = None,
) -> bool:
    """Whether a pod of the namespace of runs may send to, or receive from, a peer."""
    policies = [one["spec"] for one in objects if one["kind"] == "NetworkPolicy"]
    mine = [one for one in policies if selected(one["podSelector"], pod) and direction in one["policyTypes"]]
    key = {"Egress": "to", "Ingress": "from"}[direction]
    rules: list[Any] = [rule for one in mine for rule in one.get(direction.lower()) or []]
    return not mine or any(
        any(matches(peer, None if address else namespace, labels or {}, address) for peer in rule[key])
        and ("ports" not in rule or {"protocol": protocol, "port": port} in rule["ports"])
        for rule in rules
    )


@pytest.fixture(scope="module")
def small() -> list[Object]:
    return render(EXAMPLES["small"])


def test_no_rule_is_open_to_everyone_by_leaving_out_its_peers(objects: list[Object]) -> None:
    for one in objects:
        if one["kind"] == "NetworkPolicy":
            assert sorted(one["spec"]["policyTypes"]) == ["Egress", "Ingress"]
            assert all(rule["to"] for rule in one["spec"].get("egress") or [])
            assert all(rule["from"] for rule in one["spec"].get("ingress") or [])


def test_a_stage_reaches_names_store_mlflow_kubernetes_and_kubeflow(small: list[Object]) -> None:
    assert passes(small, "Egress", STAGE, 53, protocol="UDP", namespace="kube-system")
    assert passes(small, "Egress", STAGE, 8333, labels=ours("s3"))
    assert passes(small, "Egress", STAGE, 5000, labels=ours("mlflow"))
    assert passes(small, "Egress", STAGE, 6443, address="192.0.2.1")
    assert passes(small, "Egress", STAGE, 8887, namespace="kubeflow")


def test_a_stage_reaches_nothing_else_and_is_reached_by_nobody(small: list[Object]) -> None:
    assert not passes(small, "Egress", STAGE, 22, address="192.0.2.1")
    assert not passes(small, "Egress", STAGE, 80, address="169.254.169.254")  # keys of the machine, in most clouds
    assert not passes(small, "Egress", STAGE, 8888, labels=ours("s3"))  # the filer, which has no password
    assert not passes(small, "Egress", STAGE, 8000, labels=ours("serving"))
    assert not passes(small, "Ingress", STAGE, 80, labels=STAGE)


def test_prometheus_reads_the_metrics_of_stages_and_nothing_else_of_them() -> None:
    objects = render(CASES["everything"])
    for pod in (STAGE, {**ours("training"), "tessera.dev/stage": "sft", "tessera.dev/run": "r"}):
        assert passes(objects, "Ingress", pod, 9464, namespace="monitoring")
        assert not passes(objects, "Ingress", pod, 9464, namespace="elsewhere")
        assert not passes(objects, "Ingress", pod, 29500, namespace="monitoring")


def test_nodes_of_a_training_reach_each_other_and_not_kubernetes() -> None:
    objects = render({"network": {"egress": {"store": None, "mlflow": None}}}, namespace=RUNS)
    node = {**ours("training"), "tessera.dev/stage": "sft", "tessera.dev/run": "r"}
    assert passes(objects, "Egress", node, 29500, labels=node)
    assert passes(objects, "Ingress", node, 29500, labels=node)
    assert not passes(objects, "Ingress", node, 29500, labels=STAGE)
    assert not passes(objects, "Egress", node, 6443, address="192.0.2.1")
    assert not passes(objects, "Egress", node, 8887, namespace="kubeflow")


def test_a_server_reads_the_store_and_answers_its_clients_only() -> None:
    objects = render(CASES["everything"])
    server = ours("serving")
    assert passes(objects, "Egress", server, 8333, labels=ours("s3"))
    assert not passes(objects, "Egress", server, 5000, labels=ours("mlflow"))
    assert not passes(objects, "Egress", server, 6443, address="192.0.2.1")
    assert passes(objects, "Ingress", server, 8000, namespace="gateway")
    assert passes(objects, "Ingress", server, 8000, namespace="monitoring")
    assert not passes(objects, "Ingress", server, 8000, namespace="elsewhere")


def test_a_judge_reaches_the_store_and_the_servers_which_the_gateway_reaches_too() -> None:
    objects = render(EXAMPLES["serving"], namespace=RUNS)
    judge, server = ours("judge"), ours("serving")
    assert passes(objects, "Egress", judge, 8000, labels=server)
    assert passes(objects, "Ingress", server, 8000, labels=judge)
    assert passes(objects, "Egress", judge, 443, address="192.0.2.1")
    assert not passes(objects, "Egress", judge, 8000, labels=STAGE)
    assert not passes(objects, "Ingress", judge, 8000, labels=server)
    assert passes(objects, "Ingress", server, 8000, namespace="gateway")
    assert not passes(objects, "Ingress", server, 8000, labels=STAGE)


def test_the_operator_reaches_kubernetes_kubeflow_the_store_mlflow_and_git_and_is_reached_by_nobody() -> None:
    objects = render(CASES["everything"])
    operator = ours("operator")
    assert passes(objects, "Egress", operator, 53, protocol="UDP", namespace="kube-system")
    assert passes(objects, "Egress", operator, 6443, address="192.0.2.1")
    assert passes(objects, "Egress", operator, 8888, namespace="kubeflow")
    assert passes(objects, "Egress", operator, 8333, labels=ours("s3"))
    assert passes(objects, "Egress", operator, 5000, labels=ours("mlflow"))
    assert passes(objects, "Egress", operator, 443, address="192.0.2.1")
    assert not passes(objects, "Egress", operator, 22, address="192.0.2.1")
    assert not passes(objects, "Ingress", operator, 8080, labels=STAGE)


def test_the_embedded_parts_answer_their_namespace_on_one_port(small: list[Object]) -> None:
    for component, port in (("s3", 8333), ("mlflow", 5000)):
        assert passes(small, "Ingress", ours(component), port, labels=STAGE)
        assert not passes(small, "Ingress", ours(component), port, namespace="elsewhere")
        assert not passes(small, "Ingress", ours(component), 8888, labels=STAGE)
        assert not passes(small, "Egress", ours(component), 443, address="192.0.2.1")


def test_other_pods_are_denied_where_the_values_say_so(small: list[Object]) -> None:
    assert not passes(small, "Egress", OTHER, 443, address="192.0.2.1")
    assert passes(small, "Egress", DRIVER, 8887, namespace="kubeflow")
    default = render(namespace=RUNS)
    assert passes(default, "Egress", OTHER, 443, address="192.0.2.1")
    assert passes(default, "Egress", DRIVER, 9999, address="192.0.2.1")  # pods of other pipelines are not ours


def test_the_policies_can_be_left_out() -> None:
    kinds = {one["kind"] for one in render({"network": {"enabled": False}})}
    assert "NetworkPolicy" not in kinds


def test_the_labels_of_the_chart_are_those_that_its_policies_select(small: list[Object]) -> None:
    for component in ("s3", "mlflow"):
        template = find(small, "StatefulSet", f"tessera-{component}")["spec"]["template"]
        assert template["metadata"]["labels"] == ours(component)
    runtime = find(small, "TrainingRuntime", "tessera-torch")["spec"]["template"]["spec"]
    assert runtime["replicatedJobs"][0]["template"]["spec"]["template"]["metadata"]["labels"] == ours("training")
