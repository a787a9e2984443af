"""Models that the chart serves: a canary behind a real gateway, judged by the chart's Job and a real Prometheus.

`tests/vllm_standin.py` takes the place of vLLM, since two of those are too heavy for a small machine. The rest of
the pods is the chart's, and the model comes from a store by its digest. A file of the model has the version and the
faults of its stand-in, so a bad version differs from a good one in its digest alone.
"""

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from components.core.store.signatures import sign_artifact
from components.core.store.store import Store, open_store
from infra.chart import render
from infra.testcluster.gateway import GATEWAY_NAME, GATEWAY_NAMESPACE, PROMETHEUS_URL
from tests.cluster.api import Cluster
from tests.cluster.objects import Object, run_on_this_machine
from tests.cluster.streaming_clients import HOST, Tally, ask, asking_clients
from tests.helm.cases import pod_templates
from tests.s3_server import S3Server, fresh_prefix
from tests.vllm_standin import Behaviour, sums

pytestmark = pytest.mark.cluster

ROLLOUTS = "argoproj.io/v1alpha1"
NAME = "tessera-serving-nano"
SECRET = "tessera-store"
PATIENCE_S = 900
TOKEN_S = 0.25
ROUTES_S = 4.0
"""Twice the time for which Traefik keeps its routes at least (`providersThrottleDuration`)."""
GOOD = Behaviour("1", token_s=TOKEN_S)
log = logging.getLogger(__name__)


class Served:
    """The model `nano` of one namespace."""

    def __init__(self, cluster: Cluster, store: Store, key: Path, endpoint: str, scratch: Path) -> None:
        self.cluster, self._store, self._key, self._endpoint, self._scratch = cluster, store, key, endpoint, scratch
        self._problems = self._put(
            "data", {"test-standard.jsonl": "".join(json.dumps(row) + "\n" for row in sums(220))}
        )

    def install(self, behaviour: Behaviour) -> None:
        """Create what the chart makes, and wait until the gateway answers."""
        self.cluster.create(*self._objects(behaviour))
        self.wait_for("Healthy")
        self.cluster.wait("the gateway answers", self._answers)

    def change(self, behaviour: Behaviour) -> None:
        """Serve another digest from now on, as a commit does."""
        (rollout,) = (one for one in self._objects(behaviour) if one["kind"] == "Rollout")
        self.cluster.patch(ROLLOUTS, "Rollout", NAME, {"spec": {"template": rollout["spec"]["template"]}})

    def status(self) -> Object:
        """Status of the Rollout, empty until its controller has seen the last change."""
        found = self.cluster.get(ROLLOUTS, "Rollout", NAME)
        status: Object = found.get("status", {})
        return status if status.get("observedGeneration") == str(found["metadata"]["generation"]) else {}

    def wait_for(self, phase: str) -> float:
        """Wait for a phase of the Rollout; returns the seconds it took."""
        started = time.monotonic()
        self.cluster.wait(f"the Rollout is {phase}", lambda: self.status().get("phase") == phase, PATIENCE_S)
        return time.monotonic() - started

    def judge_log(self) -> str:
        """What the last judge printed."""
        pods = self.cluster.all("v1", "Pod", label_selector="app.kubernetes.io/component=judge")
        last = max(pods, key=lambda pod: pod["metadata"]["creationTimestamp"])
        return self.cluster.log(last["metadata"]["name"])

    def analysis(self) -> dict[str, str]:
        """Phases of the metrics of all analyses."""
        runs = self.cluster.all(ROLLOUTS, "AnalysisRun")
        return {
            metric["name"]: metric["phase"]
            for run in sorted(runs, key=lambda run: run["metadata"]["creationTimestamp"])
            for metric in run.get("status", {}).get("metricResults", [])
        }

    def _answers(self) -> bool:
        """Whether no request is lost for a while.

        The first routes of a new model may have servers of one version only, while both share its requests.
        """
        tally, end = Tally(), time.monotonic() + ROUTES_S
        while not tally.lost and time.monotonic() < end:
            ask(tally, stream=False)
        return not tally.lost

    def _put(self, kind: Any, files: dict[str, str]) -> str:
        folder = self._scratch / f"artifact-{time.monotonic_ns()}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return self._store.put_folder(folder, kind).digest

    def _objects(self, behaviour: Behaviour) -> list[Object]:
        """What the chart makes, with the image and the folders of this machine, and the stand-in in place of vLLM."""
        digest = self._put("model", {"behaviour.json": json.dumps(asdict(behaviour), sort_keys=True)})
        sign_artifact(self._store, digest, self._key)
        public = self._key.with_suffix(".pub").read_text()
        model = {
            "digest": digest,
            "hostnames": [HOST],
            "gpus": 0,
            "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
            "longestAnswerSeconds": 30,
            "drainSeconds": 5,
            "startSeconds": 240,
            "cache": {"size": "1Gi"},
            "canary": {"problems": self._problems, "stepSeconds": 15, "checkSeconds": 5, "maxTokens": 64},
        }
        gateway = {"name": GATEWAY_NAME, "namespace": GATEWAY_NAMESPACE}
        values = {
            "namespace": {"name": self.cluster.namespace},
            "store": {"uri": self._store.uri, "endpoint": self._endpoint, "existingSecret": SECRET},
            "training": {"enabled": False},
            "queues": {"enabled": False},
            "dashboards": {"enabled": False},
            "serving": {
                "router": "traefik",
                "gateway": gateway,
                "prometheus": PROMETHEUS_URL,
                "trustedKeys": [public],
                "models": {"nano": model},
            },
        }
        objects = render(values, release=self.cluster.namespace, namespace=self.cluster.namespace)
        for template in pod_templates(objects):
            run_on_this_machine(template["spec"])
        return objects


@pytest.fixture
def served(cluster: Cluster, pod_s3: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """The model `nano`, not installed yet; the namespace has the keys of its store."""
    for group, kind in ((ROLLOUTS, "Rollout"), ("traefik.io/v1alpha1", "TraefikService")):
        cluster.need(group, kind)
    keys = {name: value for name, value in pod_s3.environment.items() if name.startswith("AWS_")}
    cluster.create({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": SECRET}, "stringData": keys})
    private = Ed25519PrivateKey.generate()
    key = tmp_path / "release.key"
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    key.with_suffix(".pub").write_bytes(
        private.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    store = open_store(fresh_prefix(pod_s3, monkeypatch))
    yield Served(cluster, store, key, pod_s3.endpoint, tmp_path)
    if (deleted := cluster.get(ROLLOUTS, "Rollout", NAME)) is not None:
        cluster.delete(ROLLOUTS, "Rollout", deleted["metadata"]["name"])


def test_a_good_version_gets_all_users_and_the_old_one_gets_them_back_without_a_lost_request(served: Served) -> None:
    served.install(GOOD)
    with asking_clients() as tally:
        served.change(Behaviour("2", token_s=TOKEN_S))
        log.info("canary, questions and steps: %.0f s", served.wait_for("Healthy"))
        assert "accepted" in served.judge_log()
        assert served.analysis() == dict.fromkeys(("questions", "errors", "first-token", "inter-token"), "Successful")
        answered = tally.complete["2"]
        served.cluster.wait("the new version answers alone", lambda: tally.complete["2"] > answered + 150)
        old = tally.complete["1"]
        served.cluster.wait("it goes on doing so", lambda: tally.complete["2"] > answered + 250)
        assert tally.complete["1"] == old
        served.change(GOOD)
        log.info("canary of the version before: %.0f s", served.wait_for("Healthy"))
        served.cluster.wait("the old version answers again", lambda: tally.complete["1"] > old + 50)
    log.info("answers: %s", dict(tally.complete))
    assert tally.lost == []


def test_a_version_that_fails_or_has_a_wrong_chat_template_is_stopped_before_it_has_users(served: Served) -> None:
    served.install(GOOD)
    with asking_clients() as tally:
        for bad, words in (
            (Behaviour("2", error_fraction=0.1, token_s=TOKEN_S), "failed"),
            (Behaviour("3", wrong_template=True, token_s=TOKEN_S), "in format"),
        ):
            served.change(bad)
            log.info("stopped by the judge: %.0f s", served.wait_for("Degraded"))
            refused = served.judge_log().partition("refused: ")[2]
            assert words in refused
            assert served.analysis() == {"questions": "Failed"}
        served.change(GOOD)
        log.info("reverted: %.0f s", served.wait_for("Healthy"))
    log.info("answers: %s", dict(tally.complete))
    assert tally.lost == []
    assert set(tally.complete) == {"1"}


def test_a_version_that_is_slow_with_users_is_stopped_by_prometheus(served: Served) -> None:
    served.install(GOOD)
    with asking_clients() as tally:
        served.change(Behaviour("2", token_s=3 * TOKEN_S))
        log.info("stopped by Prometheus: %.0f s", served.wait_for("Degraded"))
        assert "accepted" in served.judge_log()
        phases = served.analysis()
        assert phases["questions"] == "Successful"
        assert "Failed" in (phases["first-token"], phases["inter-token"])
        answered = tally.complete["1"]
        served.cluster.wait("the old version answers", lambda: tally.complete["1"] > answered + 50)
        slow = tally.complete["2"]
        served.change(GOOD)
        log.info("reverted: %.0f s", served.wait_for("Healthy"))
    log.info("answers: %s", dict(tally.complete))
    assert tally.lost == []
    assert tally.complete["2"] <= slow + 5  # open answers of the canary came to their end
