import uuid

import pytest
from kubernetes.dynamic.exceptions import ForbiddenError

from tests.cluster.conftest import Cluster
from tests.cluster.objects import PYTHON, pod
from tests.s3_server import BUCKET, S3Server

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
