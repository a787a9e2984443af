"""A stage of several nodes on a cluster: its task makes a `TrainJob` of Kubeflow Trainer, and watches it to its end.

The task asks for no GPU. The pipeline gives it the `TrainJob` without its name and command, in `MANIFEST`. The pods of
the `TrainJob` run the same command line as the task; the first of them records the result (`training_node.py`). Trainer
starts the pods again after a failure, and Kueue admits all of them together or none.
"""

import contextlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from components.core.base.background import repeated
from components.core.base.config import Config, digest_of
from components.core.base.errors import ClusterError, ProcessKilled, StageFailed, StoreError, TesseraError, parse_error
from components.core.base.kubernetes_api import kubernetes_errors, load_cluster
from components.core.base.processes import sigterm_as_interrupt
from components.core.runtime.context import Interrupted
from components.core.runtime.event_mirror import mirrored_events
from components.core.runtime.events import Events
from components.core.runtime.multi_node.training_node import HEARTBEAT_S, heartbeat_path
from components.core.runtime.refusals import is_final
from components.core.runtime.runner import (
    Digests,
    events_path,
    failure_event,
    load_verified_record,
    lookup_cached_stage,
    stage_key,
)
from components.core.runtime.stage import Stage
from components.core.store.store import StageRecord, Store

MANIFEST = "TESSERA_TRAIN_JOB"
"""Environment variable of a task that trains on several nodes: the `TrainJob`, JSON, without its name and command."""
OWN_POD = {
    "TESSERA_POD_NAME": "metadata.name",
    "TESSERA_POD_UID": "metadata.uid",
    "TESSERA_POD_NAMESPACE": "metadata.namespace",
}
"""Environment variables with the identity of the task's pod, and the fields of the pod that they are from."""
GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
CONTAINER = "node"
"""Name that Trainer demands of the training container."""
JOBSET_LABEL, INDEX_LABEL = "jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-completion-index"
POLL_S = 2.0
PATIENCE_S = 300.0
"""Longest time that the watcher waits for an API server that does not answer."""
LOG_END_S = 5.0
"""Longest time that the watcher waits for the last lines of the nodes' logs."""

Object = dict[str, Any]


def run_on_nodes(
    stage: Stage, config: Config, inputs: Digests, *, store: Store, run: str, label: str, command: Sequence[str]
) -> StageRecord:
    """The record of a stage that the pods of a `TrainJob` compute, or computed before.

    Args:
        stage: what to run.
        config: its checked configuration.
        inputs: digests of the artifacts it reads.
        store: where artifacts and records are; the pods have it too.
        run: the run that this belongs to.
        label: the role of this stage in the run.
        command: what each pod runs.

    Raises:
        TesseraError: why the training failed.
        Interrupted: SIGTERM or Ctrl-C arrived; the `TrainJob` was deleted, and its pods save a checkpoint.
    """
    with mirrored_events(store, run, label):
        record = lookup_cached_stage(stage, config, inputs, store=store, label=label, run=run)
    if record is not None:
        return record
    key = stage_key(stage, config, inputs)
    load_cluster()
    job = TrainJob(job_name(run, label, key), label, command)
    try:
        with sigterm_as_interrupt(), _heartbeats(store, run, label):
            job.run_to_end()
        record = load_verified_record(store, key, stage)
        if record is None:
            raise StageFailed(f"{label}: TrainJob {job.name} is complete, and {store.uri} has no result of it")
    except (KeyboardInterrupt, Interrupted):
        job.delete()
        raise Interrupted from None
    except TesseraError as error:
        # The first node has reported what it saw, which need not be the cause.
        with contextlib.suppress(StoreError), mirrored_events(store, run, label):
            Events(events_path(store, run, label)).emit(failure_event(error.message, error.hint, error.exit_code))
        raise
    return record


def job_name(run: str, label: str, key: str) -> str:
    """Name of the `TrainJob` of a stage of a run; a retry of the task finds the one that is there by it."""
    readable = re.sub("[^a-z0-9]+", "-", label.lower()).strip("-")
    return f"{readable[:30]}-{digest_of([run, label, key])[:10]}"


class TrainJob:
    """The `TrainJob` of a task, and the pods that Trainer makes of it.

    Args:
        name: of the object.
        label: the role of the stage, for messages.
        command: what each pod runs.
    """

    def __init__(self, name: str, label: str, command: Sequence[str]) -> None:
        from kubernetes import client

        self.name, self._label, self._command = name, label, command
        self._api, self._core = client.CustomObjectsApi(), client.CoreV1Api()
        pod, uid, self._namespace = (os.environ[name] for name in OWN_POD)
        self._owner = {"apiVersion": "v1", "kind": "Pod", "name": pod, "uid": uid}
        self._is_own = False
        self._logs: dict[str, threading.Thread] = {}

    def run_to_end(self) -> None:
        """Create the object, or adopt the one of an earlier attempt, and wait until it is complete.

        Raises:
            TesseraError: why it failed.
        """
        answered = time.monotonic()
        while True:
            try:
                if self._advance():
                    return
                answered = time.monotonic()
            except ClusterError as error:
                if not _may_pass(error) or time.monotonic() - answered > PATIENCE_S:
                    hint = "`tessera cluster check` says what the cluster lacks for stages of several nodes"
                    raise ClusterError(f"{self._label}: TrainJob {self.name}: {error.message}", hint=hint) from error
            time.sleep(POLL_S)

    def delete(self) -> None:
        """Delete the object, and its pods with it."""
        with kubernetes_errors(), _missing_is_fine():
            self._api.delete_namespaced_custom_object(*self._place(), self.name, propagation_policy="Background")

    def manifest(self) -> Object:
        """The object as it is created; the pod of the task owns it, so that it is deleted with the pod."""
        made: Object = json.loads(os.environ[MANIFEST])
        made["metadata"] = {**made["metadata"], "name": self.name, "ownerReferences": [self._owner]}
        made["spec"]["trainer"] |= {"command": [self._command[0]], "args": list(self._command[1:])}
        return made

    def _advance(self) -> bool:
        """Take the next step towards the end; returns whether it is complete."""
        found = self._read()
        if not self._is_own:
            self._take(found)
            return False
        if found is None:
            raise ProcessKilled(f"{self._label}: TrainJob {self.name} was deleted", hint="submit the recipe again")
        pods = self._pods()
        for pod in pods:
            self._follow_log(pod)
        condition = _end(found)
        if condition is None:
            return False
        ending = time.monotonic() + LOG_END_S
        for log in self._logs.values():
            log.join(max(0.0, ending - time.monotonic()))
        if condition["type"] == "Failed":
            raise self._failure(condition, pods)
        return True

    def _take(self, found: Object | None) -> None:
        """Make the object this task's, as far as that goes now."""
        if found is None:
            with kubernetes_errors():
                self._api.create_namespaced_custom_object(*self._place(), self.manifest())
            self._is_own = True
        elif "deletionTimestamp" in found["metadata"]:
            return
        elif _end(found) is not None:  # of an earlier attempt, and the store has no result
            self.delete()
        else:
            body = {"metadata": {"ownerReferences": [self._owner]}}
            with kubernetes_errors():
                self._api.patch_namespaced_custom_object(*self._place(), self.name, body)
            self._is_own = True

    def _read(self) -> Object | None:
        """The object as the API server has it, None where it is absent."""
        with kubernetes_errors(), _missing_is_fine():
            found: Object = self._api.get_namespaced_custom_object(*self._place(), self.name)
            return found
        return None

    def _place(self) -> tuple[str, str, str, str]:
        return GROUP, VERSION, self._namespace, PLURAL

    def _pods(self) -> list[Any]:
        """The pods of the nodes; Trainer gives the job set the name of the `TrainJob`."""
        with kubernetes_errors():
            pods = self._core.list_namespaced_pod(self._namespace, label_selector=f"{JOBSET_LABEL}={self.name}")
        return list(pods.items)

    def _follow_log(self, pod: Any) -> None:
        """Copy the log of a pod to standard error from when its container has started."""
        uid, status = pod.metadata.uid, _container(pod)
        if uid in self._logs or status is None or not (status.state.running or status.state.terminated):
            return
        self._logs[uid] = threading.Thread(target=self._copy_log, args=(pod.metadata.name, _node(pod)), daemon=True)
        self._logs[uid].start()

    def _copy_log(self, pod: str, node: str) -> None:
        with contextlib.suppress(ClusterError), kubernetes_errors():
            log = self._core.read_namespaced_pod_log(
                pod, self._namespace, container=CONTAINER, follow=True, _preload_content=False
            )
            for line in log:
                sys.stderr.write(f"node {node}: {line.decode(errors='replace')}")

    def _failure(self, condition: Object, pods: Sequence[Any]) -> TesseraError:
        """Why the object failed: an error of ours that is final, else the first end of a pod, else Trainer's words."""
        ended = [(pod, status.state.terminated) for pod in pods if (status := _container(pod)) is not None]
        failed = [(pod, end) for pod, end in ended if end is not None and end.exit_code != 0]
        failed.sort(key=lambda each: str(each[1].finished_at))
        errors: list[TesseraError] = [
            parse_error(end.message or "")
            or ProcessKilled(f"{self._label}: node {_node(pod)} ended with exit code {end.exit_code} ({end.reason})")
            for pod, end in failed
        ]
        errors.append(ProcessKilled(f"{self._label}: TrainJob {self.name} failed: {condition.get('message')}"))
        return next((error for error in errors if is_final(error)), errors[0])


@contextlib.contextmanager
def _heartbeats(store: Store, run: str, label: str) -> Iterator[None]:
    """Let the nodes see, during the block, that their `TrainJob` is watched."""

    def beat() -> None:
        store.put_document(heartbeat_path(run, label), {"time": time.time()})

    with contextlib.suppress(StoreError):
        beat()
    with repeated(beat, HEARTBEAT_S):
        yield


@contextlib.contextmanager
def _missing_is_fine() -> Iterator[None]:
    """Leave the block where the API server has no such object."""
    from kubernetes.client import ApiException

    try:
        yield
    except ApiException as error:
        if error.status != 404:
            raise


def _may_pass(error: ClusterError) -> bool:
    """Whether the same request may succeed later: the server did not answer, was busy, or had another object."""
    status = getattr(error.__cause__, "status", None)
    return not isinstance(status, int) or status in (0, 409, 429) or status >= 500


def _end(job: Object) -> Object | None:
    """The condition by which a `TrainJob` has ended, None where it has not."""
    conditions = job.get("status", {}).get("conditions", [])
    return next(
        (each for each in conditions if each["type"] in ("Complete", "Failed") and each["status"] == "True"), None
    )


def _container(pod: Any) -> Any:
    """The status of the training container, None before it is created."""
    return next((each for each in pod.status.container_statuses or () if each.name == CONTAINER), None)


def _node(pod: Any) -> str:
    """The number of a pod's node."""
    return str((pod.metadata.labels or {}).get(INDEX_LABEL, "?"))
