"""What a run would do: the graph, what is cached, what each stage will need, what is wrong; without torch or KFP."""

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from components.core.runtime.runner import stage_key
from components.core.store.store import Store
from components.core.training.train_config import TrainConfig
from pipelines.recipe.checks import find_faults, find_notes
from pipelines.recipe.graph import Binding, Source, Task
from pipelines.recipe.llama_nemotron import llama_nemotron, sources_of
from pipelines.recipe.schema import Recipe
from pipelines.recipe.source_files import KINDS, RECIPE_KEYS
from pipelines.run.ingest import source_digest


@dataclass(frozen=True)
class PlannedStage:
    """What is known of a stage before it runs.

    Attributes:
        label: its role.
        stage: what runs.
        after: labels of the tasks and names of the sources that it reads.
        key: its stage key; None as long as one of its inputs has yet to be made.
        cached: whether the store holds its result; None where the key is not known.
        needs: what it will need, in words.
    """

    label: str
    stage: str
    after: list[str]
    key: str | None
    cached: bool | None
    needs: str


@dataclass
class Plan:
    """What a run of a recipe would do in a store."""

    recipe: str
    stages: list[PlannedStage] = field(default_factory=list)
    faults: list[dict[str, str | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def make_plan(recipe: Recipe, store: Store) -> Plan:
    """Look at everything that can be known without work."""
    plan = Plan(recipe.name)
    plan.faults = [{"message": fault.message, "hint": fault.hint} for fault in find_faults(recipe)]
    plan.notes = [] if plan.faults else list(find_notes(recipe))
    sources = {} if plan.faults else source_digests(recipe, store)
    made: dict[str, dict[str, str]] = {}
    for task in llama_nemotron(recipe).items():
        inputs = task.digests(sources, made)
        key = None if inputs is None else stage_key(task.stage, task.config, inputs)
        record = None if key is None else store.stage_record(key)
        if record is not None:
            made[task.label] = record.outputs
        cached = None if key is None else record is not None
        after = list(dict.fromkeys(_name(binding) for binding in task.upstream))
        plan.stages.append(PlannedStage(task.label, task.stage.name, after, key, cached, _needs(task)))
    return plan


def source_digests(recipe: Recipe, store: Store) -> dict[str, str]:
    """Digests of the user's own artifacts, where they can be had quickly."""
    found = {name: source_digest(store, name, paths, KINDS[name]) for name, paths in sources_of(recipe).items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def _name(binding: Binding) -> str:
    return f"your {RECIPE_KEYS.get(binding.name, binding.name)}" if isinstance(binding, Source) else binding.task


def _needs(task: Task) -> str:
    """Nodes, processes, threads, memory and devices, and the tokens of a training run."""
    place = task.placement
    parts = [f"{place.processes} x {place.threads} threads", f"{place.memory_gib:g} GiB"]
    if place.nodes > 1:
        parts[0] = f"{place.nodes} nodes of {parts[0]}"
    if place.gpus:
        parts.append(f"{place.gpus} GPU{'s' if place.gpus > 1 else ''}")
    if place.node_pool:
        parts.append(f"pool {place.node_pool}")
    if isinstance(task.config, TrainConfig):
        config = task.config
        parts.append(f"{config.num_steps * config.global_batch_size * config.seq_len / 1e6:.2f} M tokens")
    return ", ".join(parts)


def show_plan(plan: Plan, console: Console) -> None:
    """A line a stage, then what is wrong."""
    table = Table("stage", "after", "result", "needs", title=f"recipe {plan.recipe}", title_justify="left")
    for stage in plan.stages:
        result = {True: "[cyan]cached", False: "to run", None: "to run"}[stage.cached]
        table.add_row(stage.label, ", ".join(stage.after), result, stage.needs)
    console.print(table)
    for note in plan.notes:
        console.print(note, markup=False, soft_wrap=True)
    for fault in plan.faults:
        console.print(f"wrong: {fault['message']}", style="red", markup=False, soft_wrap=True)
        if fault["hint"]:
            console.print(f"  hint: {fault['hint']}", markup=False, soft_wrap=True)
    if not plan.faults:
        console.print("nothing is wrong", style="green")


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        "recipe": plan.recipe,
        "stages": [vars(stage) for stage in plan.stages],
        "faults": plan.faults,
        "notes": plan.notes,
    }
