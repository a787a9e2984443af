"""Submits a recipe to Kubeflow Pipelines, and follows the run from this machine until it ends."""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from components.core.base.config import digest_of
from components.core.base.errors import (
    ClusterError,
    InputError,
    RunStopped,
    StageFailed,
    StoreError,
    TesseraError,
)
from components.core.base.kubernetes_api import load_cluster
from components.core.base.run_name import check_run_name
from components.core.runtime.event_mirror import fetch_events
from components.core.runtime.runner import events_path
from components.core.store.store import Store, open_store
from pipelines.recipe.checks import check
from pipelines.recipe.graph import Graph
from pipelines.recipe.kfp_pipeline import compile_pipeline
from pipelines.recipe.schema import Recipe
from pipelines.records.runs import Outcome, as_recorded, begin_run, end_run, has_results_of, run_names, run_record
from pipelines.run.cluster_queues import read_pools, refuse_large_stages
from pipelines.run.finish_run import fetch_results, show_results
from pipelines.run.ingest import ingest_sources
from pipelines.run.kfp_server import KfpRun, KfpServer
from pipelines.run.progress import Follower, StageState
from pipelines.run.terminal_view import open_view
from pipelines.run.waiting_pods import WaitingPods
from pipelines.sizing.predictions import record_run_prediction

POLL_S = 2.0
PATIENCE_S = 300.0
"""Longest time that a watcher waits for a server that does not answer; the run goes on without it."""
OUTCOMES: dict[str, Outcome] = {"SUCCEEDED": "succeeded", "CANCELED": "interrupted"}
"""How a run has ended, by KFP's state; all other states mean that it failed."""


@dataclass(frozen=True)
class Submitted:
    """A run of a recipe on a cluster.

    Attributes:
        name: of the run, in the store and in KFP.
        graph: what runs.
        kfp: the run on the server; None where `find` found none.
        is_new: whether it was started now.
    """

    name: str
    graph: Graph
    kfp: KfpRun | None
    is_new: bool = False


class Submitter:
    """Finds, starts and follows the run of a recipe.

    The name of a run has the digest of the compiled pipeline, so that the same recipe with the same files is the same
    run: a second submission finds it. A run that failed goes on under its name; what is finished is in the store.

    Args:
        store_uri: an object store, which pods reach too.
        server: takes the pipeline.
        namespace: of the pods.
        queues: whether Kueue admits the pods.
        console: shows the progress.
    """

    def __init__(self, store_uri: str, server: KfpServer, namespace: str, *, queues: bool, console: Console) -> None:
        self._server, self._namespace, self._queues, self._console = server, namespace, queues, console
        self._store_uri, self._store = store_uri, pod_store(store_uri)

    def submit(self, recipe: Recipe, name: str | None) -> Submitted:
        """Start a run of a recipe, or find the one that runs or has succeeded.

        Raises:
            InputError: the recipe cannot be used, or asks for more than the cluster has.
            ClusterError: the server does not answer, or refuses.
        """
        recipe = as_recorded(self._store, recipe, name)
        graph = check(recipe)
        if self._queues:
            self._refuse_large_stages(graph)
        sources = ingest_sources(self._store, recipe)
        with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
            file = Path(folder) / "pipeline.yaml"
            name = name or self._name(recipe, graph, sources, file)
            found, record = self._server.find_run(check_run_name(name)), self._record(name)
            if record is not None and not has_results_of(record, recipe):
                raise InputError(f"there is a run {name!r} of another recipe", hint="choose another --run NAME")
            has_succeeded = record is not None and record["status"] == "succeeded"
            if found is not None and (found.is_active or (found.state == "SUCCEEDED" and has_succeeded)):
                return Submitted(name, graph, found)
            compile_pipeline(graph, sources, file, run_label=name, queues=self._queues)
            version = digest_of(file.read_text(encoding="utf-8"))[:12]
            description = f"Recipe {recipe.name}, {recipe.digest[:12]}"
            pipeline = self._server.upload(file, recipe.name, version, description)
        begin_run(self._store, recipe, sources, name)
        record_run_prediction(self._store, name, recipe)
        self._forget_earlier_attempt(name)
        try:
            started = self._server.start(name, recipe.name, pipeline, {"store": self._store.uri, "run": name})
        except TesseraError:
            end_run(self._store, name, "failed")
            raise
        return Submitted(name, graph, started, is_new=True)

    def find(self, recipe: Recipe, name: str | None) -> Submitted:
        """The newest run of a recipe on the server, whatever its state."""
        graph = check(recipe)
        if name is None:
            sources = ingest_sources(self._store, recipe)
            with tempfile.TemporaryDirectory(prefix="tessera-") as folder:
                name = self._name(recipe, graph, sources, Path(folder) / "pipeline.yaml")
        return Submitted(name, graph, self._server.find_run(name))

    def cancel(self, submitted: Submitted) -> None:
        """End a run that is active.

        Raises:
            InputError: there is no such run, or it has ended.
        """
        if submitted.kfp is None or not submitted.kfp.is_active:
            state = "there is none" if submitted.kfp is None else f"it is {submitted.kfp.state}"
            raise InputError(f"no run {submitted.name} to cancel at {self._server.url}: {state}")
        self._server.terminate(submitted.kfp.id)
        record = self._record(submitted.name)
        if record is not None and record["status"] != "succeeded":  # its last task may have recorded a failure already
            end_run(self._store, submitted.name, "interrupted")

    def watch(self, submitted: Submitted) -> None:
        """Show the progress of a run until it ends, then its results.

        Raises:
            StageFailed: a stage failed; the message names it and its page.
            InputError: a stage refused its input.
            RunStopped: the run was cancelled, or the user stopped watching it.
        """
        assert submitted.kfp is not None
        name, page = submitted.name, self._server.page(submitted.kfp.id)
        try:
            ended, follower = self._follow(submitted, submitted.kfp)
        except KeyboardInterrupt:
            hint = "the same command goes on watching; with --cancel instead of --watch it ends the run"
            raise RunStopped(f"run {name} goes on without this command: {page}", hint=hint) from None
        outcome = self._record_end(name, OUTCOMES.get(ended.state, "failed"))
        if ended.state == "SUCCEEDED":
            show_results(self._store_uri, name, fetch_results(self._store, name), self._console)
            return
        if ended.state == "CANCELED" or outcome == "interrupted":
            raise RunStopped(f"run {name} was cancelled", hint="the same command goes on from what is finished")
        for stage in follower.stages.values():
            if stage.status == "failed":
                raise stage.error(page)
        raise StageFailed(f"run {name} failed: {ended.error or ended.state}", hint=f"logs: {page}")

    def _follow(self, submitted: Submitted, run: KfpRun) -> tuple[KfpRun, Follower]:
        """Show events until the run has ended; servers may be away for a while."""
        store, name = self._store, submitted.name
        if submitted.is_new:
            fetch_events(store, name)  # of an earlier attempt, which the follower leaves out
        files = {item.label: events_path(store, name, item.label) for item in submitted.graph.items()}
        follower = Follower(files, from_start=not submitted.is_new)
        waiting = WaitingPods(self._namespace, name, [task.label for task in submitted.graph.tasks])
        answered = time.monotonic()
        with open_view(follower.stages, self._console) as view:
            while True:
                try:
                    run = self._server.run(run.id)
                    fetch_events(store, name)
                    answered = time.monotonic()
                except (ClusterError, StoreError):
                    if time.monotonic() - answered >= PATIENCE_S:
                        raise
                else:
                    for stage, event in follower.poll():
                        view.event(stage, event)
                    for label, reason in waiting.news():
                        view.event(StageState(label), {"type": "note", "text": reason})
                    if not run.is_active:
                        return run, follower
                time.sleep(POLL_S)

    def _name(self, recipe: Recipe, graph: Graph, sources: dict[str, str], file: Path) -> str:
        """Name of the run: the recipe's, and the digest of the pipeline and the store."""
        compile_pipeline(graph, sources, file, queues=self._queues)
        return f"{recipe.name}-{digest_of([file.read_text(encoding='utf-8'), self._store.uri])[:8]}"

    def _refuse_large_stages(self, graph: Graph) -> None:
        """Refuse what the cluster's queues cannot take; where they cannot be read, Kueue itself lets such pods wait."""
        try:
            load_cluster()
            pools = read_pools(self._namespace)
        except ClusterError as error:
            self._console.print(f"queues are not checked: {error.message}", style="dim", markup=False, soft_wrap=True)
            return
        refuse_large_stages(graph, pools)

    def _record(self, name: str) -> dict[str, Any] | None:
        """The store's record of a run, None where it has none."""
        return run_record(self._store, name) if name in run_names(self._store) else None

    def _record_end(self, name: str, outcome: Outcome) -> str:
        """Record how a run ended, where nothing did before: it was cancelled, or could not be started.

        Returns:
            How the run ended, by its record.
        """
        record = self._record(name)
        if record is not None and record["status"] == "running":
            record = end_run(self._store, name, outcome)
        return outcome if record is None else str(record["status"])

    def _forget_earlier_attempt(self, name: str) -> None:
        """Remove from the run which stages an earlier attempt had finished, and the errors that were final for it."""
        for part in ("stages", "refusals"):
            for path in self._store.documents(f"runs/{name}/{part}/"):
                self._store.backend.delete(path)


def pod_store(uri: str) -> Store:
    """The store of a run on a cluster.

    Raises:
        InputError: it is a folder of this machine.
    """
    store = open_store(uri)
    if store.backend.folder is not None:
        raise InputError(
            f"the store {uri} is a folder of this machine, which pods do not see", hint="--store s3://bucket/prefix"
        )
    return store
