"""What Kubeflow Pipelines costs: two pods a task, and a whole run beside `tessera run`. `python -m tests.bench.kfp`.

The environment says where everything is, as for `make test-kfp`; KUBECONFIG has to open the cluster. Kubernetes records
whole seconds, so each figure is a median over the stages of the smallest recipe.
"""

import argparse
import datetime
import itertools
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from kubernetes import client

from components.core.base.kubernetes_api import load_cluster
from pipelines.run.kfp_server import KfpServer
from tests.bench.rows import Row, write_rows
from tests.kfp.submit_command import SubmitCommand, tessera
from tests.small_recipe import only_run, write_recipe

ROLE = "pipelines.kubeflow.org/runtime-role"
"""Annotation of KFP's pods: `driver`, or `launcher` for the pod of a component."""


class Pod(NamedTuple):
    """Unix times of a pod."""

    is_driver: bool
    created: float
    started: float
    """Start of its main container."""
    ended: float


def main() -> None:
    """Run the recipe on both sides, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kfp", default=os.environ.get("TESSERA_KFP"), help="address of Kubeflow Pipelines")
    parser.add_argument("--namespace", default=os.environ.get("TESSERA_NAMESPACE", "kubeflow"))
    parser.add_argument("--store", default=os.environ.get("TESSERA_STORE"), help="object store that pods open")
    parser.add_argument("--out", type=Path, default=Path("bench-kfp.json"), help="JSON file to write")
    options = parser.parse_args()
    if not options.kfp or not options.store:
        parser.error("--kfp and --store are needed")
    with tempfile.TemporaryDirectory(prefix="tessera-bench-") as folder:
        recipe = write_recipe(Path(folder), "kfp-bench")
        submit = SubmitCommand(recipe, f"{options.store.rstrip('/')}/bench-{uuid.uuid4().hex[:8]}")
        began = time.time()
        _demand(submit("--kfp", options.kfp, "--namespace", options.namespace, "--watch"))
        on_cluster = time.time() - began
        began_locally = time.time()
        _demand(tessera("run", str(recipe), "--store", str(Path(folder, "local"))))
        local = time.time() - began_locally
    server = KfpServer(options.kfp, options.namespace)
    run = server.find_run(only_run(submit.store))
    assert run is not None
    rows = pod_rows(read_pods(options.namespace, run.id), began)
    rows.append(Row("whole run, `tessera submit --watch`", on_cluster, "s", "tessera run", local / on_cluster))
    write_rows([*rows, Row("whole run, `tessera run`", local, "s")], options.out)


def read_pods(namespace: str, run_id: str) -> list[Pod]:
    """The pods of a run that have ended, in the order in which they were made."""
    load_cluster()
    found = client.CoreV1Api().list_namespaced_pod(namespace, label_selector=f"pipeline/runid={run_id}").items
    return sorted((_pod(each) for each in found if each.status.phase == "Succeeded"), key=lambda pod: pod.created)


def pod_rows(pods: list[Pod], submitted: float) -> list[Row]:
    """What the pods of a run, one after another, spent on what."""
    drivers, executors = ([pod for pod in pods if pod.is_driver is which] for which in (True, False))
    waits = [after.created - before.ended for before, after in itertools.pairwise(pods)]
    return [
        Row("from the command to the first pod", pods[0].created - submitted, "s"),
        _median("a driver's pod, from its creation to its end", (pod.ended - pod.created for pod in drivers)),
        _median("a stage's pod, until our program starts", (pod.started - pod.created for pod in executors)),
        _median("our program in a stage's pod", (pod.ended - pod.started for pod in executors)),
        _median("from the end of a pod to the next", waits),
        Row("pods", len(pods), ""),
    ]


def _median(name: str, values: Iterable[float]) -> Row:
    return Row(name, statistics.median(values), "s")


def _pod(found: Any) -> Pod:
    (main_container,) = [each for each in found.status.container_statuses if each.name == "main"]
    ended = main_container.state.terminated
    return Pod(
        found.metadata.annotations.get(ROLE) == "driver",
        *(_seconds(each) for each in (found.metadata.creation_timestamp, ended.started_at, ended.finished_at)),
    )


def _seconds(moment: datetime.datetime) -> float:
    return moment.timestamp()


def _demand(done: Any) -> None:
    """Stop where a command failed."""
    if done.returncode != 0:
        sys.exit(f"{done.args} failed:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    main()
