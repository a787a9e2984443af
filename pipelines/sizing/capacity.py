"""What does not fit the memory, the disk or the processor that there is, and the way out. Imports no torch."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from components.core.training.step_memory import Step, step_memory
from components.core.training.train_config import TrainConfig
from components.rl.config import RlConfig
from components.search.config import Measurement
from components.search.costs.work_time import Computer
from pipelines.recipe.checks import RUN_AS_RANKS
from pipelines.recipe.graph import Task
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import Recipe
from pipelines.sizing.machine import Machine
from pipelines.sizing.stage_work import Models, StageWork, rl_step, training_step

USABLE = 0.95
"""Share of a GPU's memory that tensors can have: the rest is its context, and what the allocator cannot use."""
SMALL_BYTES, LARGE_BYTES = 100 << 20, 100 << 30
MAX_RANKS = 64
"""Most ranks that a way out speaks of."""
SLOW_PRECISION = 2.0
"""Times as long for an answer from which on another precision is advised."""


@dataclass(frozen=True)
class Misfit:
    """Something that does not fit.

    Attributes:
        message: what, with the numbers.
        hint: the way out.
    """

    message: str
    hint: str


def find_misfits(
    recipe: Recipe, models: Models, work: Mapping[str, StageWork], machine: Machine, free_bytes: int | None
) -> Iterator[Misfit]:
    """Stages that take more memory than there is, and results that take more disk.

    Args:
        recipe: has the placements.
        models: of the recipe.
        work: of each stage by its label, without those whose result is there already.
        machine: what the stages run on.
        free_bytes: of the store's disk; None where it is not known.
    """
    for task in llama_nemotron(recipe).items():
        if task.label in work:
            yield from _memory(task, work[task.label].memory_bytes, models, machine)
            yield from _offloaded(task, work[task.label].offloaded_bytes)
    needed = sum(each.disk_bytes for each in work.values())
    if free_bytes is not None and needed > free_bytes:
        yield Misfit(
            f"the run writes about {size_in_words(needed)}, and {size_in_words(free_bytes)} are free",
            "free space, or name a store elsewhere with --store",
        )


def find_slow_precisions(recipe: Recipe, models: Models, machine: Machine) -> Iterator[str]:
    """Precisions that stages serve models in and that the processor is much slower in than in float32.

    Args:
        recipe: has the precisions and the placements.
        models: of the recipe.
        machine: what the stages run on.
    """
    slow: dict[str, list[str]] = {}
    for task in llama_nemotron(recipe).items():
        serving = getattr(task.config, "serving", None)
        computer = machine.computer(task.placement, spreads=False)
        if serving is None or computer is None or task.placement.gpus:
            continue
        dtype = serving.dtype or models.stored
        ratio = _answer_s(models, computer, dtype) / _answer_s(models, computer, "float32")
        if ratio > SLOW_PRECISION:
            times = f"{computer.device.name} takes about {ratio:.0f} times as long for an answer in {dtype}"
            slow.setdefault(times, []).append(task.label)
    for times, labels in slow.items():
        yield f"vLLM in {', '.join(labels)}: {times} as in float32; set serving.dtype to float32"


def _answer_s(models: Models, computer: Computer, dtype: str) -> float:
    """Time of an answer of the child."""
    return computer.generation_s(models.child, Measurement(dtype=computer.computed_dtype(dtype)), 1)


def _memory(task: Task, needed: int, models: Models, machine: Machine) -> Iterator[Misfit]:
    """A stage that takes more memory than its device or its node has."""
    place, spreads = task.placement, task.stage in RUN_AS_RANKS
    computer = machine.computer(place, spreads=spreads)
    ranks = machine.num_ranks(place, spreads=spreads)
    if machine.is_named or place.gpus:
        have = int(USABLE * computer.device.memory_bytes) if computer is not None else needed
        if computer is not None and needed > have:
            message = f"{task.label} needs {size_in_words(needed)} on each device"
            message = f"{message}, and {computer.device.name} has {size_in_words(have)}"
            yield Misfit(message, _way_out(task, models, needed, have, ranks, on_gpu=True))
        return
    processes = place.processes if spreads else 1
    together, have = processes * needed, int(place.memory_gib * 2**30)
    if together <= have:
        return
    message = f"{task.label} needs {size_in_words(together)} in all its processes ({processes})"
    message = f"{message}, and placement.memory_gib is {place.memory_gib:g}"
    if machine.memory_bytes is not None and together <= machine.memory_bytes:
        here = f"this machine has {size_in_words(machine.memory_bytes)}"
        yield Misfit(message, f"set memory_gib to {math.ceil(together / 2**30)}: {here}")
    else:
        yield Misfit(message, _way_out(task, models, needed, have // processes, ranks, on_gpu=False))


def _offloaded(task: Task, needed: int) -> Iterator[Misfit]:
    """A training that is in the memory of the node, which has too little of it."""
    together, place = task.placement.processes * needed, task.placement
    if together > place.memory_gib * 2**30:
        message = f"{task.label} offloads {size_in_words(together)}, and placement.memory_gib is {place.memory_gib:g}"
        yield Misfit(message, f"set memory_gib to {math.ceil(together / 2**30)}, where the node has it")


def _way_out(task: Task, models: Models, needed: int, have: int, num_ranks: int, *, on_gpu: bool) -> str:
    """The smallest change with which a process that needs so much has enough."""
    step = _step(task, models, num_ranks, have)
    section = task.label.partition("/")[0]
    if step is None:
        return f"run it where a device has more memory, or give {section}.placement.memory_gib more"
    student = models.parent if task.label == "parent" else models.child
    other = needed - step_memory(student, step).total

    def fits(changed: Step) -> bool:
        return step_memory(student, changed).total + other <= have

    size = step.micro_batch_size // 2
    while size:
        if fits(replace(step, micro_batch_size=size)):
            return f"set {section}.micro_batch_size to {size}: the result is the same"
        size //= 2
    can_checkpoint = isinstance(task.config, TrainConfig)
    least = replace(step, micro_batch_size=1, checkpointing=can_checkpoint)
    if can_checkpoint and fits(least):
        return f"set {section}.activation_checkpointing to true, and {section}.micro_batch_size to 1"
    if fits(replace(least, optimizer="adamw_8bit")):
        again = f"{section}.activation_checkpointing to true, " if can_checkpoint else ""
        return f"set {section}.optimizer to adamw_8bit, {again}and {section}.micro_batch_size to 1"
    if on_gpu and task.stage in RUN_AS_RANKS:
        for ranks in range(num_ranks + 1, MAX_RANKS + 1):
            if fits(replace(least, num_ranks=ranks)):
                shared = f"share it over {ranks} GPUs, with {section}.activation_checkpointing and a micro batch of 1"
                offloads = can_checkpoint and fits(replace(least, offload=True))
                return f"{shared}; slower: {section}.placement.offload" if offloads else shared
    return "start from a smaller parent, or run it where there is more memory"


def _step(task: Task, models: Models, num_ranks: int, rank_bytes: int) -> Step | None:
    """The optimizer step of a task, on ranks with so much memory; None of one that trains no whole model."""
    if isinstance(task.config, TrainConfig):
        return training_step(task, num_ranks, models, rank_bytes)
    on_gpu = task.placement.gpus > 0
    return rl_step(task.config, models.stored, on_gpu=on_gpu) if isinstance(task.config, RlConfig) else None


def size_in_words(num_bytes: float) -> str:
    """Bytes in MiB or GiB."""
    if num_bytes < SMALL_BYTES:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / 2**30:,.2f} GiB" if num_bytes < LARGE_BYTES else f"{num_bytes / 2**30:,.0f} GiB"
