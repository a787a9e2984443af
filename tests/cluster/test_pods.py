import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from kubernetes.dynamic.exceptions import ForbiddenError

from tests.cluster.api import Cluster
from tests.cluster.objects import PYTHON, ROOT, pod
from tests.s3_server import BUCKET, OTHER_TEAM, S3Server, fresh_prefix

pytestmark = pytest.mark.cluster

ASK_API_SERVER = """
import json, ssl, urllib.request
folder = "/var/run/secrets/kubernetes.io/serviceaccount"
request = urllib.request.Request("https://kubernetes.default/version")
request.add_header("Authorization", f"Bearer {open(f'{folder}/token').read()}")
context = ssl.create_default_context(cafile=f"{folder}/ca.crt")
print(json.load(urllib.request.urlopen(request, context=context))["major"])
"""
PUT_OBJECT = """
import os
from minio import Minio
address = os.environ["TESSERA_S3_ENDPOINT"].removeprefix("http://")
keys = os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
client = Minio(address, *keys, secure=False, region="us-east-1")
client.fput_object("{bucket}", "{key}", "/etc/passwd")
"""
CONFIG = {"arithmetic": {"num_train": 200, "num_chats": 40, "num_validation": 16, "num_test": 16}, "seed": 3}
OUTPUTS = ("tokenizer", "corpus", "chats", "problems")


def test_a_pod_runs_on_a_real_node_to_its_end(cluster: Cluster) -> None:
    cluster.create(pod("hello", [PYTHON, "-c", "print('hello')"]))
    ended = cluster.wait_for_pod("hello")
    assert cluster.log("hello").split() == ["hello"]
    assert ended["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
    node = cluster.get("v1", "Node", ended["spec"]["nodeName"])
    assert "kwok.x-k8s.io/node" not in node["metadata"].get("annotations", {})


def test_a_pod_that_fails_shows_its_exit_code(cluster: Cluster) -> None:
    cluster.create(pod("broken", [PYTHON, "-c", "raise SystemExit(3)"]))
    ended = cluster.wait_for_pod("broken", phase="Failed")
    assert ended["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 3


def test_a_pod_reaches_the_api_server_by_name_with_its_own_token(cluster: Cluster) -> None:
    cluster.create(pod("asks", [PYTHON, "-c", ASK_API_SERVER]))
    cluster.wait_for_pod("asks")
    assert cluster.log("asks").split() == ["1"]


@pytest.mark.parametrize(
    "change",
    [
        {"privileged": True, "allowPrivilegeEscalation": True},
        {"runAsUser": 0, "runAsNonRoot": False},
        {"capabilities": {"add": ["SYS_ADMIN"]}},
    ],
    ids=["privileged", "root", "capabilities"],
)
def test_pod_security_refuses_what_restricted_forbids(cluster: Cluster, change: dict[str, object]) -> None:
    refused = pod("refused", ["true"])
    refused["spec"]["containers"][0]["securityContext"].update(change)
    with pytest.raises(ForbiddenError, match="restricted"):
        cluster.create(refused)


def test_a_pod_writes_to_the_tests_s3_server(cluster: Cluster, pod_s3: S3Server) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": pod_s3.environment}
    cluster.create(secret)
    key = uuid.uuid4().hex
    cluster.create(pod("puts", [PYTHON, "-c", PUT_OBJECT.format(bucket=BUCKET, key=key)], secret="s3"))
    cluster.wait_for_pod("puts")
    assert b"root:x:0:0" in pod_s3.client().get_object(BUCKET, key).data


def data_stage(python: str, store: str, folder: str) -> list[str]:
    """The command line of a small data stage that writes the digests of its outputs below a folder."""
    command = [python, "-m", "components.core.runtime.stage_command", "components.data.config:STAGE"]
    command += ["--config", json.dumps(CONFIG), "--store", store, "--run", "cluster-1", "--label", "data"]
    return command + [text for name in OUTPUTS for text in ("--output", name, f"{folder}/{name}")]


def run_here(store: str, folder: Path) -> dict[str, str]:
    """Digests of the outputs of the same stage, run by this process's machine."""
    subprocess.run(data_stage(sys.executable, store, str(folder)), cwd=ROOT, check=True)
    return {name: (folder / name).read_text() for name in OUTPUTS}


def test_a_stage_in_a_pod_makes_the_digests_that_it_makes_here(
    cluster: Cluster, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fresh_prefix(pod_s3, monkeypatch)
    prefix = store.removeprefix(f"s3://{BUCKET}/")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": pod_s3.environment}
    resources = {"cpu": "100m", "memory": "1Gi"}
    cluster.create(secret, pod("data", data_stage(PYTHON, store, "/tmp/digests"), resources=resources, secret="s3"))
    cluster.wait_for_pod("data")
    records = [each.object_name for each in pod_s3.client().list_objects(BUCKET, f"{prefix}/stages/")]
    assert len(records) == 1
    assert run_here(store, tmp_path / "same-store") == run_here(str(tmp_path / "store"), tmp_path / "own-store")
    after = [each.object_name for each in pod_s3.client().list_objects(BUCKET, f"{prefix}/stages/")]
    assert after == records  # the run here found the pod's result


def test_a_pod_with_the_keys_of_its_team_neither_reads_nor_writes_the_store_of_another(
    cluster: Cluster, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = fresh_prefix(pod_s3, monkeypatch)
    run_here(store, tmp_path)
    before = {each.object_name for each in pod_s3.client().list_objects(BUCKET, recursive=True)}
    pod_s3.client().make_bucket(OTHER_TEAM)
    key, secret_key = pod_s3.other_team
    environment = {**pod_s3.environment, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret_key}
    cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s3"}, "stringData": environment})
    resources = {"cpu": "100m", "memory": "1Gi"}
    for name, where in {"own": f"s3://{OTHER_TEAM}/store", "foreign": store}.items():
        cluster.create(pod(name, data_stage(PYTHON, where, "/tmp/digests"), resources=resources, secret="s3"))
    cluster.wait_for_pod("own")
    cluster.wait_for_pod("foreign", phase="Failed")
    assert "denied" in cluster.log("foreign").lower()
    assert {each.object_name for each in pod_s3.client().list_objects(BUCKET, recursive=True)} == before
