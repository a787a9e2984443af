"""Every object is one that Kubernetes, Kueue, Trainer and Prometheus take, and has what an upgrade must not change."""

import json
from copy import deepcopy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainingRuntime

from components.core.runtime.stage_command import METRICS_PORT
from infra.chart import CHART, lint, render
from tests.helm.cases import (
    CASES,
    CLUSTER_SCOPED,
    EXAMPLES,
    NAMESPACE,
    ON_CPUS,
    Object,
    chart_copy,
    find,
    pod_templates,
)

GROUPS_WITHOUT_SCHEMA = {
    "argoproj.io",
    "gateway.networking.k8s.io",
    "kueue.x-k8s.io",
    "monitoring.coreos.com",
    "traefik.io",
}
"""No package has their schemas; the exact objects are expected below, and in `test_serving.py`."""
LABELS = {
    "app.kubernetes.io/name": "tessera",
    "app.kubernetes.io/instance": "tessera",
    "app.kubernetes.io/part-of": "tessera",
    "app.kubernetes.io/managed-by": "Helm",
}


@pytest.mark.parametrize("values", CASES.values(), ids=CASES)
def test_helm_finds_nothing_to_complain_about(values: Object) -> None:
    assert lint(values) == []


def test_helm_would_find_a_fault(tmp_path: Path) -> None:
    chart = chart_copy(tmp_path)
    (chart / "templates" / "broken.yaml").write_text("kind: [")
    assert any("broken.yaml" in finding for finding in lint(chart=chart))


@pytest.mark.parametrize("version", ["1.34", "1.36", "1.37"])
def test_objects_are_valid_by_the_strict_schemas_of_kubernetes(objects: list[Object], version: str) -> None:
    for one in objects:
        group = one["apiVersion"].partition("/")[0]
        if group not in GROUPS_WITHOUT_SCHEMA | {"trainer.kubeflow.org"}:
            kubernetes_validate.validate(one, version, strict=True)


def test_a_training_runtime_is_one_of_trainer_with_jobs_of_kubernetes(objects: list[Object]) -> None:
    runtime = find(objects, "TrainingRuntime", "tessera-torch")
    model = TrainerV1alpha1TrainingRuntime.from_dict(deepcopy(runtime))
    assert model is not None
    assert json.loads(model.to_json()) == runtime  # an unknown field would be lost
    (job,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    manifest = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "node"}, "spec": job["template"]["spec"]}
    kubernetes_validate.validate(manifest, "1.34", strict=True)


def test_each_pool_has_a_flavor_and_two_queues_with_the_quotas_of_the_values() -> None:
    objects = render(EXAMPLES["gpu"], namespace=NAMESPACE)
    cpu, gpu = EXAMPLES["gpu"]["queues"]["pools"]
    assert find(objects, "ResourceFlavor", "tessera-cpu")["spec"] == {"nodeLabels": {"tessera.dev/pool": "cpu"}}
    assert find(objects, "ResourceFlavor", "tessera-gpu")["spec"] == {
        "nodeLabels": gpu["nodeLabels"],
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}],
    }
    for pool in (cpu, gpu):
        queue = find(objects, "ClusterQueue", f"tessera-{pool['name']}")["spec"]
        (group,) = queue.pop("resourceGroups")
        assert queue == {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": NAMESPACE}},
            "preemption": {"withinClusterQueue": "LowerPriority"},
        }
        (flavor,) = group["flavors"]
        assert flavor["name"] == f"tessera-{pool['name']}"
        assert group["coveredResources"] == [one["name"] for one in flavor["resources"]]
        quotas = {one["name"]: one["nominalQuota"] for one in flavor["resources"]}
        assert quotas == {name: str(quota) for name, quota in pool["quotas"].items()}
        local = find(objects, "LocalQueue", pool["name"])
        assert (local["metadata"]["namespace"], local["spec"]) == (
            NAMESPACE,
            {"clusterQueue": f"tessera-{pool['name']}"},
        )
    kueue = {one["apiVersion"] for one in objects if one["apiVersion"].startswith("kueue")}
    assert kueue == {"kueue.x-k8s.io/v1beta2"}


@pytest.mark.parametrize("quota", [8, "8", "512Gi", "1.5", "500m", 10_000_000, 2**53])
def test_a_quota_reads_as_it_is_written(quota: int | str) -> None:
    pools = [{"name": "cpu", "quotas": {"cpu": quota}}]
    queue = find(render({"queues": {"pools": pools}}), "ClusterQueue", "tessera-cpu")
    (resource,) = queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]
    assert resource["nominalQuota"] == str(quota)


def test_priorities_are_those_of_the_values_and_serving_is_the_highest() -> None:
    objects = render(EXAMPLES["gpu"])
    values = {one["metadata"]["name"]: one["value"] for one in objects if one["kind"] == "WorkloadPriorityClass"}
    assert values == {"tessera-serving": 1000, "tessera-urgent": 500, "tessera-training": 100}
    assert find(objects, "PriorityClass", "tessera-serving")["value"] > 0  # the priority of a pod without a class


def test_monitors_select_servers_and_the_embedded_s3() -> None:
    objects = render(CASES["everything"], namespace=NAMESPACE)
    server, store = (
        find(objects, *one) for one in (("PodMonitor", "tessera-serving"), ("ServiceMonitor", "tessera-s3"))
    )
    for monitor, component in ((server, "serving"), (store, "s3")):
        selector = {"name": "tessera", "instance": "tessera", "component": component}
        assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
        assert monitor["metadata"]["labels"]["release"] == "prometheus"
        assert monitor["spec"].pop("selector") == {
            "matchLabels": {f"app.kubernetes.io/{key}": value for key, value in selector.items()}
        }
    endpoint = {"portNumber": 8000, "path": "/metrics", "interval": "30s"}
    assert server["spec"] == {"podTargetLabels": ["rollouts-pod-template-hash"], "podMetricsEndpoints": [endpoint]}
    assert store["spec"] == {"endpoints": [{"port": "metrics", "interval": "30s"}]}
    service = find(objects, "Service", "tessera-s3")
    assert service["metadata"]["labels"]["app.kubernetes.io/component"] == "s3"
    assert "metrics" in [port["name"] for port in service["spec"]["ports"]]


def test_a_monitor_of_stages_reads_the_port_that_the_settings_and_the_network_policies_have() -> None:
    objects = render(CASES["everything"], namespace=NAMESPACE)
    monitor = find(objects, "PodMonitor", "tessera-stages")
    assert monitor["spec"]["selector"] == {"matchExpressions": [{"key": "tessera.dev/stage", "operator": "Exists"}]}
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    port = find(objects, "ConfigMap", "tessera-settings")["data"][METRICS_PORT]
    assert endpoint["relabelings"][1] == {
        "targetLabel": "__address__",
        "sourceLabels": ["__meta_kubernetes_pod_ip"],
        "replacement": f"$1:{port}",
    }
    opened = find(objects, "NetworkPolicy", "tessera-stages")["spec"]["ingress"]
    assert [rule["ports"] for rule in opened] == [[{"protocol": "TCP", "port": int(port)}]]
    assert METRICS_PORT not in find(render(), "ConfigMap", "tessera-settings")["data"]


def test_a_monitor_of_the_operator_reads_the_port_that_its_settings_and_its_network_policy_have() -> None:
    objects = render(CASES["everything"], namespace=NAMESPACE)
    spec = find(objects, "PodMonitor", "tessera-operator")["spec"]
    template = find(objects, "Deployment", "tessera-operator")["spec"]["template"]
    assert template["metadata"]["labels"].items() >= spec["selector"]["matchLabels"].items()
    port = int(find(objects, "ConfigMap", "tessera-settings")["data"][METRICS_PORT])
    assert spec["podMetricsEndpoints"] == [{"portNumber": port, "path": "/metrics", "interval": "30s"}]
    (container,) = template["spec"]["containers"]
    assert {"name": "metrics", "containerPort": port} in container["ports"]
    assert {"configMapRef": {"name": "tessera-settings"}} in container["envFrom"]
    (rule,) = find(objects, "NetworkPolicy", "tessera-operator")["spec"]["ingress"]
    assert rule["ports"] == [{"protocol": "TCP", "port": port}]
    unmonitored = render({"operator": {"enabled": True}})
    (container,) = find(unmonitored, "Deployment", "tessera-operator")["spec"]["template"]["spec"]["containers"]
    assert [each["name"] for each in container["ports"]] == ["health"]


def test_alerts_are_installed_with_the_monitors_as_they_are_in_their_file() -> None:
    rules = find(render(CASES["everything"]), "PrometheusRule", "tessera-alerts")
    assert rules["spec"] == yaml.safe_load((CHART / "rules" / "alerts.yaml").read_text())
    assert rules["metadata"]["labels"]["release"] == "prometheus"
    assert "PrometheusRule" not in [one["kind"] for one in render()]


def test_dashboards_link_to_the_addresses_of_the_values() -> None:
    address = "https://logs.test/explore?namespace=$namespace"
    for one in render({"dashboards": {"links": {"logs": address}}}):
        if one["metadata"]["name"].startswith("tessera-dashboard-"):
            (text,) = one["data"].values()
            links = {link["title"]: link["url"] for link in json.loads(text)["links"] if link["type"] == "link"}
            assert links == {
                "MLflow": "http://localhost:5000",
                "Kubeflow": "http://localhost:8080/#/runs",
                "Logs": address,
            }


def test_dashboards_are_config_maps_with_the_text_of_their_files(tmp_path: Path) -> None:
    chart = chart_copy(tmp_path)
    text = '{"title": "Runs", "legend": "{{stage}}",\n "note": "a: b # c"}\n'
    (chart / "dashboards" / "runs.json").write_text(text)
    made = find(render(chart=chart), "ConfigMap", "tessera-dashboard-runs")
    assert made["data"] == {"runs.json": text}
    assert made["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_every_object_has_the_standard_labels_and_the_namespace_of_runs(objects: list[Object]) -> None:
    namespace = next((one["metadata"]["name"] for one in objects if one["kind"] == "Namespace"), NAMESPACE)
    for one in objects:
        labels = one["metadata"]["labels"]
        assert labels.items() >= LABELS.items()
        assert {"app.kubernetes.io/component", "app.kubernetes.io/version", "helm.sh/chart"} <= labels.keys()
        assert one["metadata"].get("namespace") == (None if one["kind"] in CLUSTER_SCOPED else namespace)


def test_names_are_unique_and_the_namespace_is_first(objects: list[Object]) -> None:
    names = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(names) == len(set(names))
    assert "Namespace" not in [kind for kind, _ in names[1:]]


@pytest.mark.parametrize("release", ["tessera", "a", "team-" + "x" * 48])
def test_names_of_the_cluster_begin_with_the_release_and_those_of_a_namespace_do_not_change(release: str) -> None:
    for one in render(CASES["everything"], release=release):
        name = one["metadata"]["name"]
        assert len(name) <= 63
        if one["kind"] not in ("Namespace", "LocalQueue", "CustomResourceDefinition"):
            assert name.startswith(release[:40] if one["kind"] in CLUSTER_SCOPED else "tessera-")


def test_what_kubernetes_never_lets_change_stays_in_an_upgrade(tmp_path: Path) -> None:
    chart = chart_copy(tmp_path)
    about = (chart / "Chart.yaml").read_text()
    (chart / "Chart.yaml").write_text(about.replace("ersion: 0.1.0", "ersion: 0.2.0"))
    later = deepcopy(CASES["everything"])
    later["queues"] = {"pools": [{"name": "cpu", "quotas": {"cpu": 99}}], "priorities": {"serving": 2000}}
    later["embedded"]["s3"]["size"] = "200Gi"
    later["images"]["tag"] = "0.3.0"
    before, after = (
        render(CASES["everything"]),
        render(later, chart=chart, is_upgrade=True),
    )

    def immutable(objects: list[Object]) -> dict[tuple[str, str], object]:
        fixed: dict[tuple[str, str], object] = {}
        for one in objects:
            spec = one.get("spec", {})
            fixed[one["kind"], one["metadata"]["name"]] = {
                "RoleBinding": one.get("roleRef"),
                "PriorityClass": one.get("value"),
                "LocalQueue": spec,
                "Service": spec.get("clusterIP"),
                "PersistentVolumeClaim": {**spec, "resources": None},
                "Deployment": spec.get("selector"),
                "StatefulSet": (spec.get("selector"), spec.get("serviceName"), spec.get("volumeClaimTemplates")),
            }.get(one["kind"])
        return fixed

    assert immutable(before) == immutable(after)
    assert before != after
    pods = [find(objects, "StatefulSet", "tessera-s3")["spec"]["template"] for objects in (before, after)]
    assert pods[0] == pods[1]  # a new version of the chart restarts no S3 server


def test_data_stays_when_the_chart_is_uninstalled(objects: list[Object]) -> None:
    kept = {one["kind"] for one in objects if one["metadata"].get("annotations", {}).get("helm.sh/resource-policy")}
    assert kept == {one["kind"] for one in objects} & {"Namespace", "PersistentVolumeClaim", "CustomResourceDefinition"}
    volumes = {one["metadata"]["name"] for one in objects if one["kind"] == "PersistentVolumeClaim"}
    claims = [volume["persistentVolumeClaim"]["claimName"] for template in pod_templates(objects)
              for volume in template["spec"]["volumes"] if "persistentVolumeClaim" in volume]  # fmt: skip
    assert sorted({*claims} - {ON_CPUS["cache"]["claim"]}) == sorted(volumes)
