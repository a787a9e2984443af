"""A Kubernetes cluster by KUBECONFIG, and a namespace for each test that Pod Security `restricted` guards."""

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from kubernetes import config, dynamic

from components.core.store.store import open_store
from infra.testcluster.layout import GATEWAY, Layout
from pipelines.recipe.pod_settings import SETTINGS_CONFIG_MAP, STORE_KEYS, STORE_SECRET
from pipelines.records.runs import artifacts
from pipelines.run.cluster_check import SERVICE_ACCOUNT
from tests.cluster.api import Cluster
from tests.cluster.argo import ARGO, ArgoWorkflows, host_additions, pipeline_rights
from tests.cluster.kfp_standin import KfpStandIn, running_standin
from tests.cluster.objects import ROOT, Object, volume_objects
from tests.cluster.served_model import NAME, ROLLOUTS, SECRET, SignedStore
from tests.s3_server import S3Server, fresh_prefix, running_server
from tests.small_recipe import only_run, write_recipe


@pytest.fixture(scope="session")
def api() -> dynamic.DynamicClient:
    """The API server that KUBECONFIG names."""
    if not os.environ.get("KUBECONFIG"):
        pytest.fail("no cluster: use `make cluster-up test-cluster`, or set KUBECONFIG and run `make test-cluster`")
    return dynamic.DynamicClient(config.new_client_from_config())


@pytest.fixture
def cluster(api: dynamic.DynamicClient) -> Iterator[Cluster]:
    """A new namespace in which only pods run that Pod Security `restricted` lets in."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}
    api.resources.get(api_version="v1", kind="Namespace").create(body=namespace)
    cluster = Cluster(api, name)
    try:
        cluster.create(*volume_objects(name))
        cluster.wait("the default service account", lambda: cluster.get("v1", "ServiceAccount", "default"))
        yield cluster
    finally:
        cluster.remove()


@pytest.fixture
def pod_s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server that pods of the test cluster reach; a cluster by another KUBECONFIG cannot reach this machine."""
    if os.environ["KUBECONFIG"] != str(Layout.from_environment().kubeconfig):
        pytest.skip("pods of this cluster cannot reach a server of the tests")
    with running_server(lambda: tmp_path_factory.mktemp("s3"), host=GATEWAY) as server:
        yield server


@pytest.fixture
def standin(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpStandIn]:
    """A stand-in for the backend of Kubeflow Pipelines, whose runs are pods of the cluster."""
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp.Client writes a file there
    cluster.need(ARGO, "Workflow")
    cluster.create(*pipeline_rights(cluster.namespace))
    with running_standin(ArgoWorkflows(cluster), host_additions()) as standin:
        yield standin


@pytest.fixture
def pod_store(cluster: Cluster, pod_s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty store; the namespace has its keys and its address where the chart puts them."""
    keys = {name: value for name, value in pod_s3.environment.items() if name in STORE_KEYS}
    settings = {"AWS_ENDPOINT_URL": pod_s3.endpoint, "AWS_REGION": "us-east-1"}
    cluster.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": STORE_SECRET}, "stringData": keys},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": SETTINGS_CONFIG_MAP}, "data": settings},
    )
    return fresh_prefix(pod_s3, monkeypatch)


@pytest.fixture
def signed_store(
    cluster: Cluster, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SignedStore]:
    """An empty store for the model that the chart serves, whose Rollout ends before its namespace."""
    for group, kind in ((ROLLOUTS, "Rollout"), ("traefik.io/v1alpha1", "TraefikService")):
        cluster.need(group, kind)
    keys = {name: value for name, value in pod_s3.environment.items() if name.startswith("AWS_")}
    cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "stringData": keys})
    private, pem = Ed25519PrivateKey.generate(), serialization.Encoding.PEM
    key = tmp_path / "release.key"
    key.write_bytes(private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
    key.with_suffix(".pub").write_bytes(public)
    yield SignedStore(open_store(fresh_prefix(pod_s3, monkeypatch)), key, pod_s3.endpoint)
    if cluster.get(ROLLOUTS, "Rollout", NAME) is not None:
        cluster.delete(ROLLOUTS, "Rollout", NAME)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A file with the recipe."""
    return write_recipe(tmp_path, "pods")


@pytest.fixture
def submission(recipe: Path, pod_store: str, standin: KfpStandIn, cluster: Cluster) -> list[str]:
    """The arguments of `tessera` that run the recipe on the cluster and wait for its end."""
    where = ["--store", pod_store, "--kfp", standin.url, "--namespace", cluster.namespace]
    return ["submit", str(recipe), *where, "--service-account", SERVICE_ACCOUNT, "--watch"]


@contextlib.contextmanager
def submitted(submission: list[str], *options: str) -> Iterator["subprocess.Popen[bytes]"]:
    """A submission that a process of its own watches."""
    with subprocess.Popen([sys.executable, "-m", "pipelines", *submission, *options], cwd=ROOT) as process:
        try:
            yield process
        finally:
            process.kill()


def running_pod(cluster: Cluster, stage: str) -> Object:
    """The pod of a stage, once its container runs."""

    def running() -> list[Object]:
        pods = cluster.all("v1", "Pod", label_selector=f"tessera.dev/stage={stage}")
        return [pod for pod in pods if pod["status"].get("phase") == "Running"]

    found: list[Object] = cluster.wait(f"the pod of {stage} runs", running)
    return found[0]


def digests(store: str | Path) -> dict[str, str]:
    """What the only run of a store made."""
    return artifacts(open_store(store), only_run(store))
