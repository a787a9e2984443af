"""Why pods of a run do not run yet, for whoever watches it."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from components.core.base.errors import ClusterError
from components.core.base.kubernetes_api import api_client, load_cluster
from pipelines.recipe.pod_settings import QUEUE_LABEL, RUN_LABEL, STAGE_LABEL, stage_label

INTERVAL_S = 15.0
"""Between two looks at the pods."""
PATIENCE_S = 10.0
"""How long a pod may wait without a line: a node is chosen, an image is unpacked."""
MAX_CHARS = 200


class WaitingPods:
    """Looks at the pods of a run now and then, and has each reason once.

    Args:
        namespace: of the pods.
        run: its name.
        labels: of its stages.
    """

    def __init__(self, namespace: str, run: str, labels: Iterable[str]) -> None:
        self._namespace, self._run = namespace, run
        self._labels = {stage_label(label): label for label in labels}
        self._shown: dict[str, str] = {}
        self._next_look: float | None = 0.0

    def news(self) -> Iterator[tuple[str, str]]:
        """Labels of stages that wait for another reason than before, each with the reason.

        A cluster that cannot be read has no news: to watch a run, Kubeflow Pipelines is enough.
        """
        now = time.monotonic()
        if self._next_look is None or now < self._next_look:
            return
        self._next_look = now + INTERVAL_S
        try:
            load_cluster()
            reasons = read_reasons(self._namespace, self._run)
        except ClusterError:
            self._next_look = None
            return
        for value, reason in reasons.items():
            if value in self._labels and self._shown.get(value) != reason:
                self._shown[value] = reason
                yield self._labels[value], reason


def read_reasons(namespace: str, run: str) -> dict[str, str]:
    """Why pods of a run wait, by the value of the label of their stage.

    Raises:
        ClusterError: there is no cluster, or its pods may not be read.
    """
    from kubernetes import client

    with api_client() as api:
        pods = client.CoreV1Api(api).list_namespaced_pod(
            namespace, label_selector=f"{RUN_LABEL}={run},{STAGE_LABEL}", field_selector="status.phase=Pending"
        )
    waiting = [pod for pod in pods.items if time.time() - pod.metadata.creation_timestamp.timestamp() > PATIENCE_S]
    reasons = {pod.metadata.labels[STAGE_LABEL]: pod_reason(pod) for pod in waiting}
    return {stage: reason for stage, reason in reasons.items() if reason}


def pod_reason(pod: Any) -> str:
    """Why a pod waits: Kueue has not admitted it, no node takes it, or a container cannot start; empty if unknown."""
    for condition in pod.status.conditions or ():
        if condition.type == "PodScheduled" and condition.status == "False":
            if condition.reason == "SchedulingGated":
                queue = pod.metadata.labels.get(QUEUE_LABEL)
                return f"waits in queue {queue} of Kueue" if queue else "waits for a scheduling gate"
            return _short(f"no node takes the pod: {condition.message or condition.reason}")
    for container in pod.status.container_statuses or ():
        state = container.state.waiting if container.state else None
        if state is not None and state.message:
            return _short(f"{state.reason}: {state.message}")
    return ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_CHARS else f"{text[: MAX_CHARS - 1]}…"
