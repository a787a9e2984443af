import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import Cluster
from tests.cluster.objects import PYTHON, ROOT, pod
from tests.s3_server import BUCKET, S3Server, fresh_prefix

pytestmark = pytest.mark.cluster

CONFIG = {"arithmetic": {"num_train": 200, "num_chats": 40, "num_validation": 16, "num_test": 16}, "seed": 3}
OUTPUTS = ("tokenizer", "corpus", "chats", "problems")


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
