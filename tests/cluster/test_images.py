"""The images of `make images`, in pods that may not write to their root file system."""

import os
import subprocess
from pathlib import Path

import pytest

from infra.images.oci import NAME, Layout, full_name
from infra.testcluster import layout as testcluster
from pipelines.recipe.kfp_pipeline import image as image_name
from pipelines.recipe.pod_settings import HOME
from tests.cluster.api import Cluster
from tests.cluster.objects import ROOT, Object
from tests.cluster.test_pods import OUTPUTS, data_stage, run_here
from tests.s3_server import S3Server, fresh_prefix

pytestmark = pytest.mark.cluster

IMAGES = ROOT / "build" / "images"
CORE_PROGRAM = """
import importlib.util, os, pathlib
import mlflow, pipelines.run.finish_run
assert importlib.util.find_spec("torch") is None
assert importlib.util.find_spec("pytest") is None
for path in ("/opt/tessera/new", "/etc/new", "/new"):
    try:
        pathlib.Path(path).write_text("")
    except OSError as error:
        print(path, error.strerror)
pathlib.Path.home().joinpath("new").write_text("")
print(os.getuid(), pathlib.Path.home())
"""


def imported(image: str) -> str:
    """The name of an image that `make images` built, once the test cluster has it."""
    name, layout, cluster = image_name(image), Layout(IMAGES), testcluster.Layout.from_environment()
    built = {entry["annotations"][NAME]: entry["digest"] for entry in layout.manifests()}.get(full_name(name))
    if built is None:
        pytest.skip(f"{IMAGES} has no image {name}; build it with `make images`")
    if os.environ["KUBECONFIG"] != str(cluster.kubeconfig):
        pytest.skip("images are only loaded into the cluster of `make cluster-up`")
    ctr = ["ctr", "--address", str(cluster.containerd_socket), "--namespace", "k8s.io", "images"]
    found = subprocess.run([*ctr, "list", f"name=={full_name(name)}"], check=True, stdout=subprocess.PIPE, text=True)
    if built not in found.stdout:
        with subprocess.Popen([*ctr, "import", "-"], stdin=subprocess.PIPE) as importing:
            assert importing.stdin is not None
            layout.write_archive([name], importing.stdin)
        assert importing.returncode == 0
    return name


def pod(name: str, image: str, command: list[str], secret: str | None = None) -> Object:
    """A pod of an image, with its own user and entry; only the volumes of a pipeline's pod can be written."""
    volumes = {"home": HOME, "tmp": "/tmp", "shared-memory": "/dev/shm"}
    container = {
        "name": "main",
        "image": image,
        "imagePullPolicy": "Never",
        "command": command,
        "envFrom": [{"secretRef": {"name": secret}}] if secret else [],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in volumes.items()],
    }
    spec = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {"runAsNonRoot": True, "fsGroup": 10001, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [container],
        "volumes": [{"name": volume, "emptyDir": {}} for volume in volumes],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def test_core_ends_runs_without_torch_and_writes_only_to_its_volumes(cluster: Cluster) -> None:
    cluster.create(pod("core", imported("core"), ["python", "-c", CORE_PROGRAM]))
    cluster.wait_for_pod("core")
    refused = "Read-only file system"
    assert cluster.log("core").splitlines() == [
        *(f"{path} {refused}" for path in ("/opt/tessera/new", "/etc/new", "/new")),
        f"10001 {HOME}",
    ]


def test_the_entry_of_an_image_is_the_command_line_of_stages(cluster: Cluster) -> None:
    body = pod("entry", imported("core"), [])
    del body["spec"]["containers"][0]["command"]
    body["spec"]["containers"][0]["args"] = ["--help"]
    cluster.create(body)
    cluster.wait_for_pod("entry")
    assert "Run one stage on artifacts of a store" in cluster.log("entry")


def test_a_stage_in_its_image_makes_the_digests_that_it_makes_here(
    cluster: Cluster, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, store = imported("train"), fresh_prefix(pod_s3, monkeypatch)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": pod_s3.environment}
    script = '"$@" && for name in ' + " ".join(OUTPUTS) + "; do cat /tmp/digests/$name; echo; done"
    command = ["sh", "-c", script, "sh", *data_stage("python", store, "/tmp/digests")]
    cluster.create(secret, pod("data", name, command, secret="s3"))
    cluster.wait_for_pod("data")
    assert cluster.log("data").split()[-len(OUTPUTS) :] == list(run_here(str(tmp_path), tmp_path / "here").values())
