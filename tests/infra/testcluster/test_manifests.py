import base64
from collections import Counter

from infra.testcluster.layout import POOL_LABEL
from infra.testcluster.manifests import NODE_POOLS, Controller, Object, host_objects, simulated_nodes

CONTROLLER = Controller(name="toy", modules="ctrl", folders=(), webhook_port=9443, unused_webhooks=("rayjob",))


def hook(name: str, path: str) -> Object:
    return {"name": name, "clientConfig": {"service": {"name": "webhook", "namespace": "toy", "path": path}}}


def test_webhooks_name_an_address_and_the_authority_instead_of_a_service() -> None:
    configuration = {
        "kind": "ValidatingWebhookConfiguration",
        "webhooks": [hook("vpod.io", "/v"), hook("vrayjob.io", "/r")],
    }
    (changed,) = host_objects([configuration], CONTROLLER, b"authority")
    authority = base64.b64encode(b"authority").decode()
    assert changed["webhooks"] == [
        {"name": "vpod.io", "clientConfig": {"url": "https://127.0.0.1:9443/v", "caBundle": authority}}
    ]


def test_conversions_of_custom_kinds_name_an_address_too() -> None:
    conversion = {"strategy": "Webhook", "webhook": hook("", "/convert")}
    crd = {"kind": "CustomResourceDefinition", "spec": {"conversion": conversion}}
    (changed,) = host_objects([crd], CONTROLLER, b"authority")
    assert changed["spec"]["conversion"]["webhook"]["clientConfig"]["url"] == "https://127.0.0.1:9443/convert"


def test_what_would_run_the_controller_as_a_pod_is_left_out_and_namespaces_come_first() -> None:
    kinds = ["ClusterRole", "Deployment", "CustomResourceDefinition", "Service", "Secret", "Namespace"]
    changed = host_objects([{"kind": kind} for kind in kinds], CONTROLLER, b"")
    assert [found["kind"] for found in changed] == ["Namespace", "CustomResourceDefinition", "ClusterRole"]


def test_every_simulated_node_carries_its_pools_label_and_repels_pods_that_do_not_ask_for_it() -> None:
    nodes = list(simulated_nodes(NODE_POOLS))
    assert Counter(node["metadata"]["labels"][POOL_LABEL] for node in nodes) == {"h100": 4, "l40s": 2}
    assert all(node["spec"]["taints"][0]["effect"] == "NoSchedule" for node in nodes)
    assert len({node["metadata"]["name"] for node in nodes}) == len(nodes)
