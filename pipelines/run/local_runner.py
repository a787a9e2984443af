"""Runs a recipe on this machine: each stage is a process with the command line that its container has on a cluster.

Cached stages are looked up and verified in this process, so that they cost no start of Python. A stage runs alone,
because costs are measured on this machine; only items of one fan-out run in parallel, on GPUs each on its own.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from getpass import getuser
from graphlib import TopologicalSorter
from pathlib import Path

from rich.console import Console

from components.core.base.config import canonical_json
from components.core.base.errors import InputError, RunStopped, StageFailed, TesseraError
from components.core.base.fault_injection import fault_point
from components.core.base.processes import end_trees, sigterm_as_interrupt
from components.core.base.run_name import check_run_name
from components.core.base.scratch_dir import scratch_dir
from components.core.runtime.hardware import VISIBLE_GPUS, visible_gpus
from components.core.runtime.placement import SHARED_CORES
from components.core.runtime.runner import Digests, events_path, lookup_cached_stage
from components.core.runtime.stage_command import ALLOCATOR, GRACE_S, RUNNER_PID, TRACKING_URI, command_line
from components.core.store.store import Store, open_store
from pipelines.recipe.checks import check
from pipelines.recipe.graph import Graph, Made, Task
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.registry import STAGES
from pipelines.recipe.schema import Recipe
from pipelines.records.run_lock import hold_run_lock
from pipelines.records.runs import Outcome, as_recorded, begin_run, end_run
from pipelines.run.finish_run import tracking_uri
from pipelines.run.ingest import ingest_sources
from pipelines.run.progress import Follower, StageState
from pipelines.run.terminal_view import View, open_view
from pipelines.sizing.predictions import record_run_prediction

POLL_S = 0.2
MAX_PARALLEL_ITEMS = 2
"""Items of a fan-out that run at once on the CPU; on GPUs as many as there are GPUs for."""


def run_recipe(recipe: Recipe, *, store_uri: str, name: str | None, console: Console) -> str:
    """Run a recipe to its end; returns the name of the run.

    Raises:
        InputError: the recipe, or what it names, cannot be used; nothing was written.
        StageFailed: a stage failed; the message names it and its log.
        RunStopped: the run was stopped.
    """
    if name is not None:
        check_run_name(name)
    check(recipe)
    store = open_store(store_uri)
    recipe = as_recorded(store, recipe, name)
    sources = ingest_sources(store, recipe)
    run = begin_run(store, recipe, sources, name)
    fault_point("run.begun")
    console.print(f"run {run}", style="bold", highlight=False)
    record_run_prediction(store, run, recipe)
    run_graph(store, run, llama_nemotron(recipe), sources, console)
    return run


def run_graph(
    store: Store, run: str, graph: Graph, sources: Mapping[str, str | list[str]], console: Console
) -> dict[str, dict[str, str]]:
    """Run all tasks of a graph as a run that has begun, and record how it ended.

    Args:
        store: holds the artifacts and the record of the run.
        run: name of the run.
        graph: what to run.
        sources: digests of the user's own artifacts.
        console: shows the progress.

    Returns:
        Outputs of every task by its label, those of a fan-out by item.

    Raises:
        InputError: a stage refused its input or settings.
        StageFailed: a stage failed; the message names it and its log.
        RunStopped: the run was stopped.
    """
    outcome: Outcome = "failed"
    try:
        with sigterm_as_interrupt(), hold_run_lock(store, run), _temporary_folder() as folder:
            items = list(graph.items())
            follower = Follower({item.label: events_path(store, run, item.label) for item in items})
            gpus = visible_gpus() if any(item.shards and item.placement.gpus for item in items) else []
            with open_view(follower.stages, console) as view:
                made = _Walk(store, run, items, sources, folder, follower, view, gpus).to_end()
        outcome = "succeeded"
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise RunStopped(f"run {run} was stopped", hint="the same command goes on from here") from None
    finally:
        fault_point("run.ending")
        end_run(store, run, outcome)
    return made


def task_environment(item: Task) -> dict[str, str]:
    """Environment variables of the process of a task; those that the user has set stay."""
    compiled = f"{tempfile.gettempdir()}/torchinductor_{getuser()}"  # outside the run's folder, for the next run
    shared = SHARED_CORES if item.shards and item.shards != ("0/1",) else {}
    return {"TORCHINDUCTOR_CACHE_DIR": compiled, **ALLOCATOR, **shared, **os.environ}


def log_path(store: Store, run: str, label: str) -> Path:
    """File of this machine that takes the output of a stage of a run."""
    return events_path(store, run, label).with_suffix(".log")


@dataclass
class _Walk:
    """Walks the graph of a run: starts each task once its inputs are made, and collects the outputs."""

    store: Store
    run: str
    items: list[Task]
    sources: Mapping[str, str | list[str]]
    folder: Path
    """Takes temporary files of the stages and the digests that they write."""
    follower: Follower
    view: View
    free_gpus: list[str]
    """GPUs that no item of a fan-out has."""
    made: dict[str, dict[str, str]] = field(default_factory=dict)
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    gpus_of: dict[str, list[str]] = field(default_factory=dict)
    """GPUs of each running item of a fan-out."""

    def to_end(self) -> dict[str, dict[str, str]]:
        """Run every task after those that it reads from; returns the outputs of each."""
        upstream = {item.label: [b.task for b in item.upstream if isinstance(b, Made)] for item in self.items}
        by_label = {item.label: item for item in self.items}
        order: TopologicalSorter[str] = TopologicalSorter(upstream)
        order.prepare()
        waiting: list[tuple[Task, Digests]] = []
        try:
            while order.is_active():
                for label in order.get_ready():
                    inputs = by_label[label].digests(self.sources, self.made) or {}
                    if self._is_cached(by_label[label], inputs):
                        order.done(label)
                    else:
                        waiting.append((by_label[label], inputs))
                waiting = [(item, inputs) for item, inputs in waiting if not self._start(item, inputs)]
                for label in self._finished():
                    order.done(label)
                self._show()
                if self.running:
                    time.sleep(POLL_S)
        finally:
            end_trees(list(self.running.values()), GRACE_S)
            self._show()
        return self.made

    def _is_cached(self, item: Task, inputs: Digests) -> bool:
        """Whether the store has a verified result of a task; if so, its outputs are recorded."""
        record = lookup_cached_stage(item.stage, item.config, inputs, store=self.store, label=item.label, run=self.run)
        if record is not None:
            self.made[item.label] = record.outputs
        self._show()
        return record is not None

    def _start(self, item: Task, inputs: Digests) -> bool:
        """Start a task if nothing is in its way; returns whether it was started."""
        if not self._may_start(item):
            return False
        values = {
            "config": canonical_json(item.config.canonical()),
            "placement": canonical_json(item.placement.canonical()),
            "store": self.store.uri,
            "run": self.run,
            "label": item.label,
        }
        digests = {name: canonical_json(v) if isinstance(v, list) else v for name, v in inputs.items()}
        outputs = {name: str(self._digest_file(item, name)) for name in item.stage.outputs}
        command = [sys.executable, *command_line(STAGES[item.stage.name], values, digests, outputs)]
        # A socket needs a short path, so TMPDIR is short.
        environment = {**task_environment(item), "TMPDIR": str(self.folder), RUNNER_PID: str(os.getpid())}
        environment[TRACKING_URI] = tracking_uri(self.store)
        if gpus := self._take_gpus(item):
            environment[VISIBLE_GPUS] = ",".join(gpus)
        log = log_path(self.store, self.run, item.label)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self.running[item.label] = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return True

    def _may_start(self, item: Task) -> bool:
        """Whether a task can run now: alone, or as an item of a fan-out beside others, on GPUs that are free."""
        if not self.running:
            return True
        if not item.shards or any(not by.shards for by in self.items if by.label in self.running):
            return False
        wanted = item.placement.gpus
        return len(self.free_gpus) >= wanted if wanted else len(self.running) < MAX_PARALLEL_ITEMS

    def _take_gpus(self, item: Task) -> list[str]:
        """GPUs for an item of a fan-out; none for another task, which can use all, or where there are not so many."""
        wanted = item.placement.gpus if item.shards else 0
        if not 0 < wanted <= len(self.free_gpus):
            return []
        taken, self.free_gpus = self.free_gpus[:wanted], self.free_gpus[wanted:]
        self.gpus_of[item.label] = taken
        return taken

    def _finished(self) -> list[str]:
        """Labels of the tasks that have succeeded since the last call.

        Raises:
            TesseraError: a task has failed.
        """
        ended = [label for label, process in self.running.items() if process.poll() is not None]
        for label in ended:
            process = self.running.pop(label)
            end_trees([process], 0.0)
            self.free_gpus += self.gpus_of.pop(label, [])
            if process.returncode != 0:
                self._show()
                raise self._failure(label, process.returncode)
            item = next(item for item in self.items if item.label == label)
            digests = {name: self._digest_file(item, name).read_text(encoding="utf-8") for name in item.stage.outputs}
            self.made[label] = {name: digest for name, digest in digests.items() if digest}
        return ended

    def _digest_file(self, item: Task, output: str) -> Path:
        """File to which a task writes the digest of an output."""
        return self.folder / "digests" / item.label.replace("/", ".") / output

    def _show(self) -> None:
        """Show the events that the stages have reported since the last call."""
        for stage, event in self.follower.poll():
            self.view.event(stage, event)

    def _failure(self, label: str, status: int) -> TesseraError:
        """Why a stage failed: its reported error, else its exit status and the last line of its log."""
        log = log_path(self.store, self.run, label)
        state: StageState = self.follower.stages[label]
        if state.status == "failed":
            return state.error(str(log))
        kind = InputError if status == InputError.exit_code else StageFailed
        lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "nothing")
        how = f"was killed by {signal.Signals(-status).name} (out of memory?)" if status < 0 else f"ended with {status}"
        return kind(f"stage {label} {how}; its log ends with: {last}", hint=f"log: {log}")


@contextlib.contextmanager
def _temporary_folder() -> Iterator[Path]:
    """A folder of this process for temporary files of its stages, removed afterwards."""
    parent = Path(tempfile.gettempdir()) / f"tessera-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.lstat().st_uid != os.getuid():
        raise InputError(f"{parent} belongs to somebody else", hint="set TMPDIR to a folder of your own")
    with scratch_dir(parent, str(os.getpid())) as folder:
        yield folder
