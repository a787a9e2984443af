"""One stage on a user's own files: the same key, cache and resume as in a run, and the same view of it."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from components.core.base.config import Config, digest_of
from components.core.base.errors import InputError
from components.core.base.suggestions import nearest
from components.core.runtime.placement import Placement
from components.core.runtime.runner import Digests, stage_key
from components.core.runtime.stage import Input, Stage
from components.core.store.store import StageRecord, Store, digests_by_name, open_store
from pipelines.recipe.graph import Graph, Made, Source, Task
from pipelines.recipe.schema import Recipe
from pipelines.records.runs import begin_stage
from pipelines.run.ingest import ingest
from pipelines.run.local_runner import run_graph

ALONE = "alone"
"""Name of the recipe that has nothing but the settings of one stage."""


def run_single(
    stage: Stage,
    settings: dict[str, Any],
    inputs: Mapping[str, Sequence[str]],
    outputs: Mapping[str, Sequence[str]],
    store: Store,
    console: Console,
) -> StageRecord:
    """Run a stage and write its outputs as plain files.

    Args:
        stage: what to run.
        settings: its configuration, and `placement` as a further key.
        inputs: for each input the paths, or the address of an artifact.
        outputs: for each output a folder that is not there yet, or the URI of a store.
        store: takes inputs, outputs and checkpoints.
        console: shows the progress.

    Raises:
        InputError: a name is unknown, an input is not there or not of its kind, an output folder is in use.
    """
    placement = Placement.parse(settings.pop("placement", None) or {}, where="placement")
    if "skip_bad" in settings and "skip_bad" not in stage.config.model_fields:
        raise InputError(f"stage {stage.name} reads no rows of yours to skip", hint="leave --skip-bad out")
    # As a recipe gives it to the stage, so that a run of a recipe finds the result.
    config = Recipe(name=ALONE).config(stage.config.parse(settings), stage.config)
    for name in outputs:
        if name not in stage.outputs:
            raise InputError(f"stage {stage.name} has no output {name!r}", hint=nearest(name, list(stage.outputs)))
    targets = {name: values[-1] for name, values in outputs.items()}
    for name, target in targets.items():
        check_free(target, f"output {name}")
    for name in inputs:
        if name not in stage.inputs:
            raise InputError(f"stage {stage.name} has no input {name!r}", hint=nearest(name, list(stage.inputs)))
    digests: Digests = {name: _ingest(store, name, values, stage.inputs[name]) for name, values in inputs.items()}
    _check_required(stage, digests)
    record = _run_recorded(stage, config, digests, placement, store, console)
    for name, target in targets.items():
        if name in record.outputs:
            export(store, record.outputs[name], target)
    return record


def _check_required(stage: Stage, digests: Digests) -> None:
    """Refuse to start without an input that the stage needs."""
    for name, declared in stage.inputs.items():
        if not declared.optional and not digests.get(name):
            raise InputError(
                f"stage {stage.name} needs the input {name!r}: {declared.doc}", hint=f"give --input {name}=PATH"
            )


def _run_recorded(
    stage: Stage, config: Config, digests: Digests, placement: Placement, store: Store, console: Console
) -> StageRecord:
    """Run a stage as a run of its own, a graph of one task, and show its progress."""
    graph = Graph(stage.name, digest_of(config.canonical()))
    graph.tasks.append(Task(stage.name, stage, config, placement, {name: Source(name) for name in digests}))
    graph.roles |= {name: Made(stage.name, name) for name in stage.outputs}
    run = begin_stage(store, graph, {stage.name: config.canonical()}, digests_by_name(digests))
    console.print(f"run {run}", style="bold", highlight=False)
    run_graph(store, run, graph, digests, console)
    record = store.stage_record(stage_key(stage, config, digests))
    assert record is not None
    return record


def _ingest(store: Store, name: str, values: Sequence[str], declared: Input) -> str | list[str]:
    """Bring an input into the store: several paths are a list of artifacts, or the files of one, as declared."""
    if declared.many:
        return [ingest(store, name, [value], declared.kind) for value in values]
    return ingest(store, name, values, declared.kind)


def check_free(target: str, what: str) -> None:
    """Refuse to write into a folder that holds something."""
    if "://" not in target and Path(target).exists() and (not Path(target).is_dir() or any(Path(target).iterdir())):
        raise InputError(f"{what}: {target} is there already and not empty", hint="name a folder that does not exist")


def export(store: Store, digest: str, target: str) -> None:
    """Write an artifact as plain files into a folder, or into another store."""
    folder = store.fetch(digest)
    if "://" in target:
        open_store(target).put_folder(folder, store.manifest(digest).kind)
    else:
        # Copied without their modes: files in the store's cache are read-only, the user's own are not.
        shutil.copytree(folder, target, dirs_exist_ok=True, copy_function=shutil.copyfile)


def pairs(texts: Sequence[str]) -> dict[str, list[str]]:
    """`NAME=VALUE` texts as values by name."""
    values: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise InputError(f"{text!r} is not of the form NAME=PATH_OR_URI")
        values.setdefault(name, []).append(value)
    return values
