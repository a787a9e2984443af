"""What a run would do, and what it would take: without torch or KFP, and before anything runs."""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from shutil import disk_usage
from typing import Any

from rich.console import Console
from rich.table import Table

from components.core.runtime.runner import stage_key
from components.core.store.store import Store
from components.core.training.train_config import TrainConfig
from pipelines.recipe.checks import find_faults, find_notes
from pipelines.recipe.graph import Binding, Source, Task
from pipelines.recipe.llama_nemotron import llama_nemotron, sources_of
from pipelines.recipe.schema import Recipe, rules_of
from pipelines.recipe.setting_rules.facts import Setting
from pipelines.recipe.source_files import KINDS, RECIPE_KEYS
from pipelines.records.predictions import keep_prediction
from pipelines.run.ingest import source_digest
from pipelines.sizing.capacity import Misfit, find_misfits, find_slow_precisions, size_in_words
from pipelines.sizing.machine import Machine
from pipelines.sizing.predictions import prediction_of
from pipelines.sizing.stage_work import Models, StageWork, recipe_work


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


@dataclass(frozen=True)
class Prediction:
    """What a run would take on a machine.

    Attributes:
        device: what computes.
        child: what stands for the child, which only the search will know.
        work: of each stage that would run, by its label.
        misfits: what does not fit.
        chosen: settings that are as the rules choose them for this parent, whether filled in or written.
        warnings: why not to trust the speed of the machine, and what makes a run slower than it has to be.
    """

    device: str
    child: str
    work: dict[str, StageWork]
    misfits: list[Misfit]
    chosen: list[Setting]
    warnings: list[str]


@dataclass
class Plan:
    """What a run of a recipe would do in a store."""

    recipe: str
    stages: list[PlannedStage] = field(default_factory=list)
    faults: list[dict[str, str | None]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prediction: Prediction | None = None


def make_plan(recipe: Recipe, store: Store, machine: Callable[[], Machine] | None = None) -> Plan:
    """Look at everything that can be known without work.

    Args:
        recipe: what would run.
        store: where results are.
        machine: gives what it would run on, if it is to be predicted what that takes; asked only if nothing is wrong.
    """
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
    if machine is not None and not plan.faults:
        cached_labels = {stage.label for stage in plan.stages if stage.cached}
        here = machine()
        models, work = recipe_work(recipe, here)
        if models is None:
            plan.notes.append("what the run takes is not predicted: the parent is in a store, or there is none")
        else:
            to_run = {label: each for label, each in work.items() if label not in cached_labels}
            plan.prediction = predict(recipe, models, to_run, here, _free_bytes(store))
            # The report of a run of this recipe tells it again, beside what was measured.
            keep_prediction(store, recipe.digest, prediction_of(work, _device_name(here) or None))
    return plan


def predict(
    recipe: Recipe, models: Models, work: dict[str, StageWork], machine: Machine, free_bytes: int | None
) -> Prediction:
    """What a run would take.

    Args:
        recipe: what would run.
        models: of the recipe.
        work: of the stages that are not cached.
        machine: what they run on.
        free_bytes: of the store's disk; None where it is not known.
    """
    return Prediction(
        device=_device_name(machine) or "this machine, whose speed is not known: that needs torch, or --device",
        child=_child_in_words(models),
        work=work,
        misfits=list(find_misfits(recipe, models, work, machine, free_bytes)),
        chosen=list(_as_the_rules_choose(recipe)),
        warnings=[*filter(None, [machine.busy_warning]), *find_slow_precisions(recipe, models, machine)],
    )


def source_digests(recipe: Recipe, store: Store) -> dict[str, str]:
    """Digests of the user's own artifacts, where they can be had quickly."""
    found = {name: source_digest(store, name, paths, KINDS[name]) for name, paths in sources_of(recipe).items()}
    return {name: digest for name, digest in found.items() if digest is not None}


def _device_name(machine: Machine) -> str:
    """What computes, in words; a machine with GPUs has both."""
    names = [machine.processor.name] if machine.processor else []
    if machine.gpu:
        names.append(f"{machine.gpus} x {machine.gpu.name}")
    return ", ".join(names)


def _child_in_words(models: Models) -> str:
    if models.child == models.parent:
        return ""
    return (
        f"the child is counted as {len(models.child.blocks)} of the parent's {len(models.parent.blocks)} layers, "
        f"{models.child.parameters / 1e6:,.1f} M parameters, as its limits leave; the search will tell"
    )


def _as_the_rules_choose(recipe: Recipe) -> Iterator[Setting]:
    """Settings that are as the rules choose them for this parent, filled in or written, with the reason."""
    for setting in rules_of(recipe):
        found: Any = recipe
        for key in setting.key.split("."):
            found = getattr(found, key)
        if (list(found) if isinstance(found, tuple) else found) == setting.value:
            yield setting


def _free_bytes(store: Store) -> int:
    """Free space where working copies go; in a local store all is there."""
    folder = Path(store.local).absolute()
    while not folder.exists():
        folder = folder.parent
    return disk_usage(folder).free


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
    """A line a stage, what the run takes, then what is wrong."""
    table = Table("stage", "after", "result", "needs", title=f"recipe {plan.recipe}", title_justify="left")
    for stage in plan.stages:
        result = {True: "[cyan]cached", False: "to run", None: "to run"}[stage.cached]
        table.add_row(stage.label, ", ".join(stage.after), result, stage.needs)
    console.print(table)
    if plan.prediction is not None:
        _show_prediction(plan.prediction, console)
    for note in plan.notes:
        console.print(note, markup=False, soft_wrap=True)
    for fault in plan.faults:
        console.print(f"wrong: {fault['message']}", style="red", markup=False, soft_wrap=True)
        if fault["hint"]:
            console.print(f"  hint: {fault['hint']}", markup=False, soft_wrap=True)
    if not plan.faults:
        console.print("nothing is wrong", style="green")


def _show_prediction(prediction: Prediction, console: Console) -> None:
    """A line a stage, the sum, what does not fit, and the reasons of settings."""
    columns = ("stage", "tokens", "FLOPs", "time", "memory a device", "disk")
    table = Table(*columns, title=f"predicted for {prediction.device}", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for label, work in prediction.work.items():
        table.add_row(
            label,
            _short(work.tokens),
            _short(work.flops),
            in_words(work.seconds),
            size_in_words(work.memory_bytes),
            size_in_words(work.disk_bytes) if work.disk_bytes else "",
        )
    times = [work.seconds for work in prediction.work.values() if work.seconds is not None]
    unknown = len(times) < len(prediction.work)
    total = ("at least " if unknown and times else "") + in_words(sum(times) if times else None)
    flops, disk_bytes = (sum(getattr(w, name) for w in prediction.work.values()) for name in ("flops", "disk_bytes"))
    table.add_section()
    table.add_row("one after the other", "", _short(flops), total, "", size_in_words(disk_bytes))
    console.print(table)
    if prediction.child:
        console.print(prediction.child, markup=False, soft_wrap=True)
    for setting in prediction.chosen:
        value = f"{setting.value:g}" if isinstance(setting.value, float) else str(setting.value)
        console.print(f"{setting.key} is {value}: {setting.reason}", markup=False, highlight=False, soft_wrap=True)
    for misfit in prediction.misfits:
        console.print(f"does not fit: {misfit.message}", style="yellow", markup=False, soft_wrap=True)
        console.print(f"  hint: {misfit.hint}", markup=False, soft_wrap=True)


def _short(count: float) -> str:
    """A count with a unit; empty for none."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return str(int(count)) if count else ""


def in_words(seconds: float | None) -> str:
    """A time; `unknown` where there is none."""
    if seconds is None:
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values."""
    return {
        "recipe": plan.recipe,
        "stages": [vars(stage) for stage in plan.stages],
        "faults": plan.faults,
        "notes": plan.notes,
        "prediction": None if plan.prediction is None else asdict(plan.prediction),
    }
