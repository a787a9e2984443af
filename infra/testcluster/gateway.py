"""What serving needs: Traefik as gateway, Argo Rollouts, and a Prometheus that reads the servers of models."""

import sys
from pathlib import Path

import yaml

from infra.testcluster.controllers import established
from infra.testcluster.layout import API_URL, Layout
from infra.testcluster.manifests import GATEWAY_API, ROLLOUTS, Object, objects_file
from infra.testcluster.services import Service, apply_file
from infra.testcluster.wheels import TRAEFIK

GATEWAY_NAME, GATEWAY_NAMESPACE, GATEWAY_PORT = "public", "gateway", 8000
PROMETHEUS_URL = "http://127.0.0.1:9095"
"""Reached by host processes, such as the controller of Argo Rollouts."""
TRAEFIK_KINDS = {
    "IngressRoute": "ingressroutes",
    "IngressRouteTCP": "ingressroutetcps",
    "IngressRouteUDP": "ingressrouteudps",
    "Middleware": "middlewares",
    "MiddlewareTCP": "middlewaretcps",
    "ServersTransport": "serverstransports",
    "ServersTransportTCP": "serverstransporttcps",
    "TLSOption": "tlsoptions",
    "TLSStore": "tlsstores",
    "TraefikService": "traefikservices",
}
"""Every kind that Traefik watches, with its plural: it serves nothing while one is missing."""


def gateway_services(layout: Layout) -> list[Service]:
    """The gateway, the controller of canaries, and what measures them."""
    return [_traefik(layout), _rollouts(layout), _discovery(layout), _prometheus(layout)]


def traefik_definitions() -> list[Object]:
    """Definitions of Traefik's own kinds that take any fields; the published ones are in no Go module."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    version = {"name": "v1alpha1", "served": True, "storage": True, "schema": {"openAPIV3Schema": anything}}
    return [
        {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{plural}.traefik.io"},
            "spec": {
                "group": "traefik.io",
                "scope": "Namespaced",
                "names": {"kind": kind, "plural": plural, "singular": kind.lower()},
                "versions": [version],
            },
        }
        for kind, plural in TRAEFIK_KINDS.items()
    ]


def gateway_objects() -> list[Object]:
    """The gateway that takes routes of every namespace."""
    group = "gateway.networking.k8s.io/v1"
    listener = {
        "name": "web",
        "protocol": "HTTP",
        "port": GATEWAY_PORT,
        "allowedRoutes": {"namespaces": {"from": "All"}},
    }
    return [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": GATEWAY_NAMESPACE}},
        {
            "apiVersion": group,
            "kind": "GatewayClass",
            "metadata": {"name": "traefik"},
            "spec": {"controllerName": "traefik.io/gateway-controller"},
        },
        {
            "apiVersion": group,
            "kind": "Gateway",
            "metadata": {"name": GATEWAY_NAME, "namespace": GATEWAY_NAMESPACE},
            "spec": {"gatewayClassName": "traefik", "listeners": [listener]},
        },
    ]


def _traefik(layout: Layout) -> Service:
    kinds, gateway = layout.manifests / "traefik.yaml", layout.manifests / "gateway-objects.yaml"
    options = {
        "providers.kubernetesgateway": "true",
        "providers.kubernetescrd": "true",
        # A route answers 404 while one of its versions has no server, as a canary has none until its first is ready.
        "providers.kubernetescrd.allowemptyservices": "true",
        "entrypoints.web.address": f":{GATEWAY_PORT}",
        "entrypoints.traefik.address": "127.0.0.1:8099",
        "ping": "true",
        "global.checknewversion": "false",
        "global.sendanonymoususage": "false",
    }
    return Service(
        name="traefik",
        modules=TRAEFIK.name,
        command=("traefik", *(f"--{name}={value}" for name, value in options.items())),
        files={kinds: yaml.safe_dump_all(traefik_definitions()), gateway: yaml.safe_dump_all(gateway_objects())},
        # Kinds that come after its start are found after 20 s.
        before=(
            apply_file(objects_file(GATEWAY_API, layout)),
            apply_file(kinds),
            established("gateways.gateway.networking.k8s.io", *(f"{one}.traefik.io" for one in TRAEFIK_KINDS.values())),
            apply_file(gateway),
        ),
        ready_url="http://127.0.0.1:8099/ping",
    )


def _rollouts(layout: Layout) -> Service:
    options = {"kubeconfig": layout.kubeconfig, "metricsPort": 8098, "healthzPort": 8096, "leader-elect": "false"}
    kinds = ("rollouts", "analysisruns", "analysistemplates", "clusteranalysistemplates", "experiments")
    return Service(
        name="rollouts",
        modules="rollouts",
        command=("rollouts-controller", *(f"--{name}={value}" for name, value in options.items())),
        before=(apply_file(objects_file(ROLLOUTS, layout)), established(*(f"{one}.argoproj.io" for one in kinds))),
        ready_url="http://127.0.0.1:8096/healthz",
    )


def _discovery(layout: Layout) -> Service:
    keys, targets = layout.certificates, layout.state / "prometheus" / "targets.json"
    files = [keys / "ca.crt", keys / "admin.crt", keys / "admin.key"]
    return Service(
        name="discovery",
        modules="prometheus",
        command=(sys.executable, "-m", "infra.testcluster.discovery", API_URL, *map(str, files), str(targets)),
        environment={"PYTHONPATH": str(Path(__file__).parents[2])},
        # Prometheus watches the folder, which has to be there.
        files={targets: "[]"},
    )


def _prometheus(layout: Layout) -> Service:
    """Debian's Prometheus, which is built without the discovery of pods."""
    settings = layout.state / "prometheus.yaml"
    job = {"job_name": "pods", "file_sd_configs": [{"files": [str(layout.state / "prometheus" / "targets.json")]}]}
    options = {
        "config.file": settings,
        "storage.tsdb.path": layout.state / "prometheus" / "data",
        "web.listen-address": PROMETHEUS_URL.removeprefix("http://"),
    }
    return Service(
        name="prometheus",
        modules="prometheus",
        command=("prometheus", *(f"--{name}={value}" for name, value in options.items())),
        files={settings: yaml.safe_dump({"global": {"scrape_interval": "2s"}, "scrape_configs": [job]})},
        ready_url=f"{PROMETHEUS_URL}/-/ready",
    )
