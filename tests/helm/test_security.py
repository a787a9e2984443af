"""Least privilege: pods by the Pod Security Standards, roles, accounts, secrets."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from infra.chart import render
from tests.helm.cases import CASES, Object, find, pod_templates

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
    "net.ipv4.tcp_rmem",
    "net.ipv4.tcp_wmem",
}


def violations(pod: Object) -> Iterator[str]:
    """What Pod Security "restricted" refuses in the spec of a pod of Linux, by the names of its controls."""
    context = pod.get("securityContext", {})
    containers = [one for key in ("initContainers", "containers", "ephemeralContainers") for one in pod.get(key, [])]
    contexts = [one.get("securityContext", {}) for one in containers]
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(field):
            yield f"host namespaces: {field}"
    for volume in pod.get("volumes", []):
        if kinds := volume.keys() - {"name"} - VOLUMES:
            yield f"volume types: {kinds}"
    if {one["name"] for one in context.get("sysctls", [])} - SYSCTLS:
        yield "sysctls"
    for one in (context, *contexts):
        options = one.get("seLinuxOptions", {})
        types = ("", "container_t", "container_init_t", "container_kvm_t", "container_engine_t")
        if options.get("type", "") not in types or options.get("user") or options.get("role"):
            yield "SELinux"
        if one.get("appArmorProfile", {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
            yield "AppArmor"
        if one.get("seccompProfile", {}).get("type", "RuntimeDefault") not in ("RuntimeDefault", "Localhost"):
            yield "seccomp: unconfined"
        if one.get("runAsUser") == 0:
            yield "running as non-root user"
        if one.get("windowsOptions", {}).get("hostProcess"):
            yield "HostProcess"
    for container, own in zip(containers, contexts, strict=True):
        capabilities = own.get("capabilities", {})
        if own.get("privileged"):
            yield "privileged containers"
        if own.get("allowPrivilegeEscalation") is not False:
            yield "privilege escalation"
        if own.get("procMount", "Default") != "Default":
            yield "/proc mount type"
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            yield "capabilities"
        if not own.get("runAsNonRoot", context.get("runAsNonRoot")):
            yield "running as non-root"
        if not (own.get("seccompProfile") or context.get("seccompProfile")):
            yield "seccomp: no profile"
        if any(port.get("hostPort") for port in container.get("ports", [])):
            yield "host ports"
        hooks = [*container.get("lifecycle", {}).values(), *(v for k, v in container.items() if k.endswith("Probe"))]
        if any(hook.get(kind, {}).get("host") for hook in hooks for kind in ("httpGet", "tcpSocket")):
            yield "host probes and lifecycle hooks"


def test_every_pod_passes_pod_security_restricted(objects: list[Object]) -> None:
    templates = pod_templates(objects)
    jobs = sum(one["kind"] == "AnalysisTemplate" and "job" in json.dumps(one) for one in objects)
    assert len(templates) == 1 + jobs + sum(one["kind"] in ("StatefulSet", "Deployment", "Rollout") for one in objects)
    for template in templates:
        spec = template["spec"]
        assert list(violations(spec)) == []
        containers = [*spec["containers"], *spec.get("initContainers", [])]
        assert all(one["securityContext"]["readOnlyRootFilesystem"] for one in containers)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("hostNetwork",), True),
        (("volumes", 0), {"name": "host", "hostPath": {"path": "/"}}),
        (("securityContext", "runAsNonRoot"), False),
        (("securityContext", "seccompProfile"), {}),
        (("securityContext", "seccompProfile", "type"), "Unconfined"),
        (("containers", 0, "securityContext"), {}),
        (("containers", 0, "securityContext", "privileged"), True),
        (("containers", 0, "securityContext", "allowPrivilegeEscalation"), True),
        (("containers", 0, "securityContext", "capabilities"), {"drop": ["ALL"], "add": ["SYS_PTRACE"]}),
        (("containers", 0, "securityContext", "runAsUser"), 0),
        (("containers", 0, "ports"), [{"containerPort": 80, "hostPort": 80}]),
    ],
    ids=str,
)
def test_a_pod_that_asks_for_more_is_found(objects: list[Object], path: tuple[Any, ...], value: object) -> None:
    pod = deepcopy(pod_templates(objects)[0]["spec"])
    *parents, last = path
    owner: Any = pod
    for key in parents:
        owner = owner[key]
    owner[last] = value
    assert list(violations(pod)) != []


def test_a_created_namespace_enforces_pod_security_restricted(objects: list[Object]) -> None:
    for one in objects:
        if one["kind"] == "Namespace":
            labels = one["metadata"]["labels"]
            assert {labels[f"pod-security.kubernetes.io/{mode}"] for mode in ("enforce", "audit", "warn")} == {
                "restricted"
            }


def test_no_secret_is_made(objects: list[Object]) -> None:
    assert [one for one in objects if one["kind"] == "Secret"] == []


def test_keys_reach_pods_by_reference_to_the_secret_of_the_values() -> None:
    pods = [pod["spec"] for pod in pod_templates(render(CASES["everything"]))]
    containers = [one for pod in pods for one in (*pod["containers"], *pod.get("initContainers", []))]
    secrets = {
        one["name"]: [source["secretRef"]["name"] for source in one.get("envFrom", []) if "secretRef" in source]
        for one in containers
    }
    with_keys = {name: ["tessera-store"] for name in ("seaweedfs", "operator", "fetch")}
    assert secrets == with_keys | {"node": ["tessera-store", "tessera-mlflow"], "mlflow": [], "server": []}
    keys = [variable for one in containers for variable in one.get("env", []) if "KEY" in variable["name"]]
    assert keys == [{"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "clients", "key": "api-key"}}}]


def allows(rules: list[Object], verb: str, group: str, resource: str, name: str | None) -> bool:
    """Whether rules of a role allow a request; one without a name is for all objects, like list and create."""
    return any(
        verb in rule["verbs"]
        and group in rule["apiGroups"]
        and resource in rule["resources"]
        and ("resourceNames" not in rule or name in rule["resourceNames"])
        for rule in rules
    )


def test_the_account_of_pipelines_reads_no_secret_but_the_named_one(objects: list[Object]) -> None:
    rules = find(objects, "Role", "tessera-pipelines")["rules"]
    assert allows(rules, "get", "", "secrets", "mlpipeline-minio-artifact")
    for verb in ("get", "list", "watch", "create", "update", "patch", "delete", "deletecollection"):
        for name in ("tessera-store", "other", None):
            assert not allows(rules, verb, "", "secrets", name)
    for verb in ("create", "update", "patch", "delete"):
        for resource in ("pods", "pods/exec", "serviceaccounts", "serviceaccounts/token", "configmaps"):
            assert not allows(rules, verb, "", resource, "any")
        assert not allows(rules, verb, "rbac.authorization.k8s.io", "rolebindings", "any")


def test_the_account_of_pipelines_may_do_what_argo_kubeflow_and_a_training_need(objects: list[Object]) -> None:
    rules = find(objects, "Role", "tessera-pipelines")["rules"]
    assert all(allows(rules, verb, "argoproj.io", "workflowtaskresults", None) for verb in ("create", "patch"))
    assert all(allows(rules, verb, "", "pods", None) for verb in ("get", "list", "watch"))
    assert allows(rules, "get", "", "configmaps", "kfp-launcher")
    verbs = ("create", "get", "list", "watch", "update", "patch", "delete", "deletecollection")
    granted = {verb for verb in verbs if allows(rules, verb, "trainer.kubeflow.org", "trainjobs", None)}
    assert granted == {"create", "get", "patch", "delete"}
    assert allows(rules, "get", "", "pods/log", None)


def test_without_trainer_pipelines_start_no_train_job() -> None:
    objects = render({"training": {"enabled": False}})
    assert "TrainingRuntime" not in {one["kind"] for one in objects}
    groups = [rule["apiGroups"] for rule in find(objects, "Role", "tessera-pipelines")["rules"]]
    assert ["trainer.kubeflow.org"] not in groups


def test_no_role_has_a_wildcard_or_reaches_beyond_its_namespace(objects: list[Object]) -> None:
    assert {one["kind"] for one in objects}.isdisjoint({"ClusterRole", "ClusterRoleBinding"})
    for one in objects:
        for rule in one.get("rules", []) if one["kind"] == "Role" else []:
            assert not [part for parts in rule.values() for part in parts if "*" in part]


def test_only_the_accounts_of_pipelines_and_the_operator_have_rights_and_a_token(objects: list[Object]) -> None:
    bound = {subject["name"] for one in objects if one["kind"] == "RoleBinding" for subject in one["subjects"]}
    has_operator = ("Deployment", "tessera-operator") in {(one["kind"], one["metadata"]["name"]) for one in objects}
    assert bound == {"tessera-pipelines"} | ({"tessera-operator"} if has_operator else set())
    accounts = {
        one["metadata"]["name"]: one["automountServiceAccountToken"]
        for one in objects
        if one["kind"] == "ServiceAccount"
    }
    assert [name for name, token in accounts.items() if token] == ["tessera-pipelines"]
    assert {"tessera-pipelines", "tessera-serving"} <= accounts.keys()
    for template in pod_templates(objects):
        account = template["spec"]["serviceAccountName"]
        assert template["spec"]["automountServiceAccountToken"] is (account == "tessera-operator")
        assert account in accounts


def test_the_account_of_the_operator_reads_recipes_and_writes_status_alone() -> None:
    rules = find(render(CASES["everything"]), "Role", "tessera-operator")["rules"]
    assert all(allows(rules, verb, "tessera.dev", "retrainings", None) for verb in ("get", "list", "watch"))
    assert allows(rules, "update", "tessera.dev", "retrainings/status", None)
    assert allows(rules, "get", "", "configmaps", None)
    assert allows(rules, "update", "coordination.k8s.io", "leases", "tessera-operator")
    assert not allows(rules, "update", "coordination.k8s.io", "leases", "another")
    for verb in ("create", "update", "patch", "delete", "deletecollection"):
        for resource in ("retrainings", "configmaps", "secrets", "pods", "serviceaccounts"):
            assert not allows(rules, verb, "tessera.dev", resource, "any")
            assert not allows(rules, verb, "", resource, "any")
    assert allows(rules, "get", "argoproj.io", "rollouts", None)
    for verb in ("list", "watch", "create", "update", "patch", "delete", "deletecollection"):
        assert not allows(rules, verb, "argoproj.io", "rollouts", None)
    assert not allows(rules, "get", "", "secrets", "tessera-store")


def test_without_the_operator_nothing_of_it_is_installed() -> None:
    assert [
        one for one in render() if "operator" in one["metadata"]["name"] or one["kind"].endswith("Definition")
    ] == []
    without = render({"operator": {"enabled": True, "definition": False}})
    assert "CustomResourceDefinition" not in {one["kind"] for one in without}
