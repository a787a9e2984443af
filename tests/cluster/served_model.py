"""A model that the chart serves on the cluster, from a store of signed artifacts."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from components.core.store.signatures import sign_artifact
from components.core.store.store import Store
from infra.chart import render
from infra.testcluster.gateway import GATEWAY_NAME, GATEWAY_NAMESPACE, PROMETHEUS_URL
from tests.cluster.api import Cluster
from tests.cluster.objects import STANDIN, Object, run_on_this_machine
from tests.cluster.streaming_clients import HOST, Tally, ask
from tests.helm.cases import pod_templates
from tests.vllm_standin import Behaviour

ROLLOUTS = "argoproj.io/v1alpha1"
NAME = "tessera-serving-nano"
SECRET = "tessera-store"
PATIENCE_S = 900
ROUTES_S = 4.0
"""Twice the time for which Traefik keeps its routes at least (`providersThrottleDuration`)."""
LIGHT: Mapping[str, Any] = {
    "resources": {"requests": {"cpu": "20m", "memory": "64Mi"}, "limits": {"memory": "512Mi"}},
    "startSeconds": 240,
}
"""What a stand-in needs."""
log = logging.getLogger(__name__)


class SignedStore(NamedTuple):
    """A store that pods reach, whose keys the namespace has.

    Attributes:
        store: the store.
        key: file with the private key that signs models; the public one lies beside it.
        endpoint: address of its S3 server for pods.
    """

    store: Store
    key: Path
    endpoint: str

    def put(self, kind: Any, folder: Path) -> str:
        """Store a folder; returns its digest."""
        return self.store.put_folder(folder, kind).digest


class Served:
    """The model `nano` of one namespace.

    A version is a model's folder, or the behaviour of a stand-in for vLLM.
    """

    def __init__(
        self,
        cluster: Cluster,
        signed: SignedStore,
        scratch: Path,
        problems: Sequence[Mapping[str, Any]],
        own: Mapping[str, Any] = LIGHT,
        server: Sequence[str] | None = STANDIN,
    ) -> None:
        """Store the problems that the judge asks.

        Args:
            cluster: has the namespace.
            signed: takes models and problems.
            scratch: folder for files on their way into the store.
            problems: rows of test problems.
            own: the chart's values of the model.
            server: command that takes the place of the chart's; None for vLLM.
        """
        self.cluster, self._signed, self._scratch, self._own, self._server = cluster, signed, scratch, own, server
        self._problems = self._put("data", "test-standard.jsonl", "".join(json.dumps(row) + "\n" for row in problems))

    def install(self, version: Behaviour | Path) -> None:
        """Create what the chart makes, and wait until the gateway answers."""
        self.cluster.create(*self._objects(version))
        self.wait_for("Healthy")
        self.cluster.wait("the gateway answers", self._answers)

    def change(self, version: Behaviour | Path) -> None:
        """Serve another digest from now on, as a commit does."""
        (rollout,) = (one for one in self._objects(version) if one["kind"] == "Rollout")
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
        return self.cluster.log(self.last_pod("judge")["metadata"]["name"])

    def last_pod(self, component: str) -> Object:
        """The youngest pod of `serving` or `judge`."""
        pods = self.cluster.all("v1", "Pod", label_selector=f"app.kubernetes.io/component={component}")
        return max(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    def analysis(self) -> dict[str, str]:
        """Phases of the metrics of all analyses."""
        return {name: metric["phase"] for name, metric in self.metrics().items()}

    def metrics(self) -> dict[str, Object]:
        """What the last analysis says of each metric."""
        runs = self.cluster.all(ROLLOUTS, "AnalysisRun")
        return {
            metric["name"]: metric
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

    def _put(self, kind: str, name: str, text: str) -> str:
        """Store a folder of one file."""
        folder = self._scratch / f"artifact-{time.monotonic_ns()}"
        folder.mkdir()
        (folder / name).write_text(text)
        return self._signed.put(kind, folder)

    def _objects(self, version: Behaviour | Path) -> list[Object]:
        """What the chart makes, with the image and the folders of this machine."""
        if isinstance(version, Path):
            digest = self._signed.put("model", version)
        else:
            digest = self._put("model", "behaviour.json", json.dumps(asdict(version), sort_keys=True))
        sign_artifact(self._signed.store, digest, self._signed.key)
        public = self._signed.key.with_suffix(".pub").read_text()
        canary = {"stepSeconds": 15, "checkSeconds": 5, "maxTokens": 64, **self._own.get("canary", {})}
        model = {
            "digest": digest,
            "hostnames": [HOST],
            "gpus": 0,
            "longestAnswerSeconds": 30,
            "drainSeconds": 5,
            "cache": {"size": "1Gi"},
            **self._own,
            "canary": {**canary, "problems": self._problems},
        }
        gateway = {"name": GATEWAY_NAME, "namespace": GATEWAY_NAMESPACE}
        values = {
            "namespace": {"name": self.cluster.namespace},
            "store": {"uri": self._signed.store.uri, "endpoint": self._signed.endpoint, "existingSecret": SECRET},
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
            run_on_this_machine(template["spec"], self._server)
        return objects
