"""Controllers on top of Kubernetes: JobSet, Trainer, Kueue, KWOK's simulated nodes, Argo Workflows, Flux."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from infra.testcluster.images import ARGO_EXECUTOR
from infra.testcluster.layout import GATEWAY, Layout
from infra.testcluster.manifests import (
    ARGO,
    FLUX,
    GATEWAY_API,
    JOBSET,
    KUEUE,
    KWOK_NODES,
    KWOK_STAGES,
    NODE_POOLS,
    ROLLOUTS,
    TRAINER,
    Controller,
    copied_folder,
    objects_file,
    simulated_nodes,
    webhooks_file,
)
from infra.testcluster.services import Command, Service, apply_file
from pipelines.run.cluster_check import RETRY_DEFAULTS

CONTROLLERS = (JOBSET, TRAINER, KUEUE, ARGO, GATEWAY_API, ROLLOUTS, *FLUX)
KUEUE_METRICS_CERTIFICATES = Path("/etc/kueue/metrics/certs")
"""A path that Kueue's program has built in; it reads a certificate there even where metrics are off."""
SYSTEM_NAMESPACES = ["kube-system", "kueue-system"]
FLUX_NAMESPACE = "flux-system"
ALL_ESTABLISHED = ("kubectl", "wait", "crd", "--all", "--for=condition=Established", "--timeout=5s")
"""A command that succeeds when the API server serves all custom kinds: a controller ends where its own is unknown."""
QUEUED_KINDS = [
    "batch/job",
    "jobset.x-k8s.io/jobset",
    "trainer.kubeflow.org/trainjob",
    "pod",
    "deployment",
    "statefulset",
]


def controller_services(layout: Layout) -> list[Service]:
    """All controllers; JobSet stands first, because Kueue and Trainer watch its kind."""
    return [_jobset(layout), _trainer(layout), _kueue(layout), _kwok(layout), _argo(layout), *_flux(layout)]


def established(*kinds: str) -> Command:
    """A command that succeeds when the API server serves custom kinds."""
    return ("kubectl", "wait", "--for=condition=Established", "--timeout=5s", *(f"crd/{kind}" for kind in kinds))


def _jobset(layout: Layout) -> Service:
    settings = {
        "apiVersion": "config.jobset.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": "127.0.0.1:8082"},
        "metrics": {"bindAddress": "0"},
        "webhook": _webhook(JOBSET) | {"certDir": str(_serving_certificates(JOBSET, layout))},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
    }
    return _controller(JOBSET, layout, "jobset", settings, established("jobsets.jobset.x-k8s.io"), 8082)


def _trainer(layout: Layout) -> Service:
    settings = {
        "apiVersion": "config.trainer.kubeflow.org/v1alpha1",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": "127.0.0.1:8083"},
        "metrics": {"bindAddress": "0", "secureServing": False},
        "webhook": _webhook(TRAINER),
        "leaderElection": {"leaderElect": False},
        "certManagement": {"enable": False},
    }
    known = established("trainjobs.trainer.kubeflow.org")
    return _controller(TRAINER, layout, "trainer-controller-manager", settings, known, 8083)


def _kueue(layout: Layout) -> Service:
    settings = {
        "apiVersion": "config.kueue.x-k8s.io/v1beta2",
        "kind": "Configuration",
        "health": {"healthProbeBindAddress": "127.0.0.1:8081"},
        "metrics": {"bindAddress": "0"},
        "webhook": _webhook(KUEUE) | {"certDir": str(_serving_certificates(KUEUE, layout))},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        # With the second one, a pod that is preempted right after its admission, still gated, waits for ever.
        "featureGates": {"VisibilityOnDemand": False, "SkipReassignmentForPodOwnedWorkloads": False},
        "clientConnection": {"qps": 100, "burst": 200},
        "managedJobsNamespaceSelector": {
            "matchExpressions": [
                {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": SYSTEM_NAMESPACES},
            ]
        },
        "integrations": {"frameworks": QUEUED_KINDS},
    }
    service = _controller(KUEUE, layout, "kueue", settings, established("workloads.kueue.x-k8s.io"), 8081)
    return service.model_copy(update={"links": {KUEUE_METRICS_CERTIFICATES: _serving_certificates(KUEUE, layout)}})


def _kwok(layout: Layout) -> Service:
    nodes = layout.manifests / "nodes.yaml"
    stages = [f"--config={copied_folder('kwok', layout) / path}" for path in KWOK_STAGES]
    options = {
        "kubeconfig": layout.kubeconfig,
        "manage-all-nodes": "false",
        "manage-nodes-with-label-selector": KWOK_NODES,
        "cidr": "10.89.0.0/16",
        "node-ip": GATEWAY,
        "node-port": 10247,
        "node-lease-duration-seconds": 40,
    }
    return Service(
        name="kwok",
        modules="ctrl",
        command=("kwok", *stages, *(f"--{name}={value}" for name, value in options.items())),
        files={nodes: yaml.safe_dump_all(simulated_nodes(NODE_POOLS), sort_keys=False)},
        after=(
            # Not from the server's side: such a request would drop the nodes' status, which has their GPUs.
            ("kubectl", "apply", "--filename", str(nodes)),
            ("kubectl", "wait", "--for=condition=Ready", "node", f"--selector={KWOK_NODES}", "--timeout=5s"),
        ),
    )


def _argo(layout: Layout) -> Service:
    namespace, settings = "argo", layout.manifests / "argo-settings.yaml"
    # Argo's own containers pass Pod Security restricted with this.
    secure = {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    executor = {
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": {"cpu": "10m", "memory": "32Mi"}},
        "securityContext": secure,
    }
    off = yaml.safe_dump({"enabled": False})
    objects = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}},
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "workflow-controller-configmap", "namespace": namespace},
            "data": {
                "executor": yaml.safe_dump(executor),
                "metricsConfig": off,
                "telemetryConfig": off,
                "workflowDefaults": yaml.safe_dump(RETRY_DEFAULTS),
            },
        },
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": "workflow-controller"},
            "value": 1_000_000,
        },
    ]
    options = {
        "kubeconfig": layout.kubeconfig,
        "namespace": namespace,
        "configmap": "workflow-controller-configmap",
        "executor-image": ARGO_EXECUTOR,
        "executor-image-pull-policy": "IfNotPresent",
        "loglevel": "info",
    }
    return Service(
        name="argo",
        modules="argo",
        command=("workflow-controller", *(f"--{name}={value}" for name, value in options.items())),
        environment={"LEADER_ELECTION_DISABLE": "true", "DEFAULT_REQUEUE_TIME": "1s"},
        files={settings: yaml.safe_dump_all(objects)},
        before=(
            apply_file(objects_file(ARGO, layout)),
            apply_file(settings),
            established("workflows.argoproj.io", "workflowtaskresults.argoproj.io"),
        ),
        ready_url="http://127.0.0.1:6060/healthz",
        grace_period_s=1,
    )


def _flux(layout: Layout) -> list[Service]:
    """Flux's controllers of sources, kustomizations and Helm releases; the sources lie in a folder of the host."""
    folder, storage = layout.state / "flux", "127.0.0.1:9790"
    sources = {"storage-path": folder, "storage-addr": storage, "storage-adv-addr": storage}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": FLUX_NAMESPACE}}
    settings = layout.manifests / "flux-objects.yaml"
    services = []
    for number, controller in enumerate(FLUX):
        health = f"127.0.0.1:{9791 + number}"
        options = {
            "watch-all-namespaces": "true",
            "metrics-addr": "0",
            "health-addr": health,
            "requeue-dependency": "2s",
            **(sources if number == 0 else {}),
        }
        definitions = objects_file(controller, layout)
        services.append(
            Service(
                name=f"flux-{controller.name}",
                modules=controller.modules,
                command=(controller.name, *(f"--{name}={value}" for name, value in options.items())),
                environment={"RUNTIME_NAMESPACE": FLUX_NAMESPACE, "TMPDIR": str(layout.state / "tmp")},
                files={settings: yaml.safe_dump(namespace), folder / "keep": ""},  # the folder has to be there
                before=(apply_file(settings), apply_file(definitions), ALL_ESTABLISHED),
                ready_url=f"http://{health}/readyz",
            )
        )
    return services


def _controller(
    controller: Controller,
    layout: Layout,
    program: str,
    settings: Mapping[str, object],
    known: Command,
    health_port: int,
) -> Service:
    """A controller with a settings file, its certificate for webhooks, and its webhooks applied when it answers."""
    path, certificates = layout.state / f"{controller.name}.yaml", _serving_certificates(controller, layout)
    keys = layout.certificates
    return Service(
        name=controller.name,
        modules=controller.modules,
        command=(program, f"--config={path}"),
        environment={"TMPDIR": str(layout.state / "tmp" / controller.name)},
        files={
            path: yaml.safe_dump(dict(settings)),
            certificates / "tls.crt": (keys / "webhook.crt").read_text(),
            certificates / "tls.key": (keys / "webhook.key").read_text(),
        },
        before=(apply_file(objects_file(controller, layout)), known),
        ready_url=f"http://127.0.0.1:{health_port}/readyz",
        after=(apply_file(webhooks_file(controller, layout)),),
    )


def _webhook(controller: Controller) -> dict[str, object]:
    return {"host": "127.0.0.1", "port": controller.webhook_port}


def _serving_certificates(controller: Controller, layout: Layout) -> Path:
    """The folder below TMPDIR in which a controller looks for its certificate unless its settings name one."""
    return layout.state / "tmp" / controller.name / "k8s-webhook-server" / "serving-certs"
