"""Runs a recipe on this machine: the same pipeline as on a cluster, executed by kfp.local.

Finished stages are looked up and verified here, in one process, before KFP starts, and only what remains becomes a KFP
pipeline: a Python start and an import of KFP for each finished task would cost far more than the look-up. The result is
the same, because the look-up is the very one that the task would begin with (`runner.recall`: same key, same
verification of every byte), and because a finished task's digests reach the tasks that follow in both cases: through
the metadata of KFP's artifacts, or through `sources`.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from components.core.base.errors import InputError, RunStopped, StageFailed, TesseraError
from components.core.base.fault_injection import fault_point
from components.core.base.processes import group_pids
from components.core.runtime.kfp_task import GRACE_S
from components.core.runtime.runner import events_path, lookup_cached_stage
from components.core.store.store import Store, open_store
from pipelines.recipe.checks import check
from pipelines.recipe.graph import Graph, Source, Task
from pipelines.recipe.llama_nemotron import llama_nemotron, sources_of
from pipelines.recipe.schema import Recipe
from pipelines.recipe.source_files import KINDS
from pipelines.records.run_lock import hold_run_lock
from pipelines.records.runs import Outcome, begin_run, end_run
from pipelines.run.ingest import ingest
from pipelines.run.progress import Follower, StageState
from pipelines.run.terminal_view import open_view
from pipelines.run.trust import demand_sources

POLL_S = 0.2
TASK_ERROR = re.compile(r"^    [\w.]+: ")
"""The line that ends a traceback in the output of a task, which KFP indents by four spaces."""

Outputs = dict[str, str | list[str]]


def run_recipe(recipe: Recipe, *, store_uri: str, name: str | None, console: Console) -> str:
    """Run a recipe to its end; returns the name of the run.

    Raises:
        InputError: the recipe, or what it names, cannot be used; nothing was written.
        StageFailed: a stage failed; the message names it and its log.
        RunStopped: the run was stopped.
    """
    check(recipe)
    store = open_store(store_uri)
    sources = {source: ingest(store, source, paths, KINDS[source]) for source, paths in sources_of(recipe).items()}
    demand_sources(store, recipe, sources)
    run = begin_run(store, recipe, sources, name)
    fault_point("run.begun")
    console.print(f"run {run}", style="bold", highlight=False)
    outcome: Outcome = "failed"
    try:
        with _stoppable(), hold_run_lock(store, run):
            _execute(_Run(store, run, recipe, llama_nemotron(recipe), sources), console)
        outcome = "succeeded"
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise RunStopped(f"run {run} was stopped", hint="the same command goes on from here") from None
    finally:
        fault_point("run.ending")
        end_run(store, run, outcome)
    return run


@dataclass(frozen=True)
class _Run:
    """A run under way."""

    store: Store
    name: str
    recipe: Recipe
    graph: Graph
    sources: dict[str, str]

    @property
    def folder(self) -> Path:
        """Where logs and events of the run are on this machine."""
        return self.store.local / "runs" / self.name


def _execute(run: _Run, console: Console) -> None:
    """Look up what is finished, run what is not, and show both."""
    follower = Follower({task.label: events_path(run.store, run.name, task.label) for task in run.graph.items()})
    with open_view(follower.stages, console) as view:

        def show() -> None:
            for stage, event in follower.poll():
                view.event(stage, event)

        known: dict[str, Outputs] = {}
        for task in run.graph.tasks:
            outputs = _finished_outputs(task, run, known)
            if outputs is not None:
                known[task.label] = outputs
            show()
        if len(known) == len(run.graph.tasks):
            return
        with _executor(run, known) as process:
            while process.poll() is None:
                show()
                time.sleep(POLL_S)
        show()
    if process.returncode != 0:
        raise _failure(run, list(follower.stages.values()))


def _finished_outputs(task: Task, run: _Run, known: dict[str, Outputs]) -> Outputs | None:
    """What a task made before, verified; None where it, or one before it, has to run."""
    inputs: dict[str, str | list[str]] = {}
    for name, binding in task.inputs.items():
        if isinstance(binding, Source):
            inputs[name] = run.sources[binding.name]
        elif binding.task not in known:
            return None
        elif digest := known[binding.task].get(binding.output):
            inputs[name] = digest
    records = [
        lookup_cached_stage(item.stage, item.config, inputs, store=run.store, label=item.label, run=run.name)
        for item in task.items()
    ]
    finished = [record for record in records if record is not None]
    if len(finished) < len(records):
        return None
    if task.shards:
        return {name: [record.outputs[name] for record in finished] for name in task.stage.outputs}
    return dict(finished[0].outputs)


@contextlib.contextmanager
def _executor(run: _Run, known: dict[str, Outputs]) -> Iterator[subprocess.Popen[bytes]]:
    """The process that runs the rest of the pipeline, in a group of its own of which nothing outlives this context."""
    run.folder.mkdir(parents=True, exist_ok=True)
    order = run.folder / "order.json"
    values: dict[str, Any] = {
        "recipe": run.recipe.canonical(),
        "store": run.store.uri,
        "run": run.name,
        "sources": run.sources,
        "known": known,
    }
    order.write_text(json.dumps(values), encoding="utf-8")
    command = [sys.executable, "-m", "pipelines.run.executor", str(order)]
    with log_path(run.store, run.name).open("ab") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            yield process
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ask the whole group to leave, wait while stages save, then end it."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + GRACE_S
            with contextlib.suppress(KeyboardInterrupt):
                while group_pids(process.pid) and time.monotonic() < deadline:
                    time.sleep(POLL_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM do what Ctrl-C does."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def log_path(store: Store, run: str) -> Path:
    """The full log of a run on this machine."""
    return store.local / "runs" / run / "run.log"


def _failure(run: _Run, stages: list[StageState]) -> TesseraError:
    """The error that says which stage failed and why, as the stage itself told it."""
    log = log_path(run.store, run.name)
    for stage in stages:
        if stage.status == "failed":
            told = stage.failure
            kind = InputError if told.get("exit_code") == InputError.exit_code else StageFailed
            hint = "\n  ".join(filter(None, [told.get("hint"), f"log: {log}"]))
            return kind(f"stage {stage.label}: {told['error']}", hint=hint)
    running = [stage.label for stage in stages if stage.status in ("running", "interrupted")]
    where = f"stage {running[0]} ended without a word (out of memory?)" if running else "the pipeline did not run"
    return StageFailed(f"{where}; its log ends with: {_last_word(log)}", hint=f"log: {log}")


def _last_word(log: Path) -> str:
    """The last line of a log in which a task, rather than KFP after it, tells of an error."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if TASK_ERROR.match(line)] or lines or ["nothing"]
    return told[-1].strip()
