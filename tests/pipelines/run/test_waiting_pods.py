"""What a watcher reads while pods of a run wait."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.recipe.pod_settings import QUEUE_LABEL, RUN_LABEL, STAGE_LABEL
from pipelines.run import waiting_pods
from pipelines.run.waiting_pods import MAX_CHARS, WaitingPods
from tests.pipelines.run.fake_kubernetes import FakeKubernetes, running_kubernetes

PODS = "/api/v1/namespaces/team/pods"
GATED = {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated"}]}
NO_NODE = {
    "conditions": [
        {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": "0/7 nodes are available: " + "7 Insufficient cpu. " * 20,
        }
    ]
}
NO_IMAGE = {
    "conditions": [{"type": "PodScheduled", "status": "True"}],
    "containerStatuses": [
        {
            "name": "main",
            "image": "r/train:1",
            "imageID": "",
            "ready": False,
            "restartCount": 0,
            "state": {"waiting": {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "r/train:1"'}},
        }
    ],
}


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    monkeypatch.setattr(waiting_pods, "INTERVAL_S", 0.0)
    with running_kubernetes(tmp_path) as (fake, path):
        monkeypatch.setenv("KUBECONFIG", str(path))
        yield fake


def pod(stage: str, status: dict[str, Any], created: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    """A pod that waits, as the API server has it."""
    labels = {RUN_LABEL: "nano", STAGE_LABEL: stage, QUEUE_LABEL: "gpu"}
    return {
        "metadata": {"name": stage, "labels": labels, "creationTimestamp": created},
        "status": {"phase": "Pending", **status},
    }


def test_each_kind_of_waiting_is_said_once(kubernetes: FakeKubernetes) -> None:
    kubernetes.answers[PODS] = {
        "items": [
            pod("search.library", GATED),
            pod("sft", NO_NODE),
            pod("rl", NO_IMAGE),
            pod("of-another-graph", GATED),
        ]
    }
    waiting = WaitingPods("team", "nano", ["data", "search/library", "sft", "rl"])
    found = dict(waiting.news())
    assert found["search/library"] == "waits in queue gpu of Kueue"
    assert found["rl"] == 'ImagePullBackOff: Back-off pulling image "r/train:1"'
    assert found["sft"].startswith("no node takes the pod: 0/7 nodes are available: 7 Insufficient cpu.")
    assert len(found["sft"]) == MAX_CHARS
    assert found.keys() == {"search/library", "sft", "rl"}
    assert dict(waiting.news()) == {}
    kubernetes.answers[PODS] = {"items": [pod("rl", GATED)]}
    assert dict(waiting.news()) == {"rl": "waits in queue gpu of Kueue"}


def test_a_pod_that_has_just_come_is_not_mentioned(kubernetes: FakeKubernetes) -> None:
    kubernetes.answers[PODS] = {"items": [pod("sft", GATED, created="2999-01-01T00:00:00Z")]}
    assert dict(WaitingPods("team", "nano", ["sft"]).news()) == {}


def test_who_may_not_read_pods_is_left_in_peace(kubernetes: FakeKubernetes) -> None:
    kubernetes.answers[PODS] = None
    waiting = WaitingPods("team", "nano", ["sft"])
    assert dict(waiting.news()) == {}
    kubernetes.answers[PODS] = {"items": [pod("sft", GATED)]}
    assert dict(waiting.news()) == {}
