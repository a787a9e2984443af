"""The block library: every variant of every sub-block, trained alone to do what the parent's own does.

Decoupled blockwise local distillation: a variant is fed the parent's own activations and learns the output of the
parent's sub-block, while everything around it stays the parent's. No gradient passes from one variant to another, so
one forward pass of the parent feeds them all. The parent's own sub-blocks and the no-ops need no training.

Source: arXiv 2411.19146, section 3.

Shape letters: B rows, T tokens, D hidden size, N tokens that are no padding.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.core.batches import PackedStream
from components.core.job import Interrupted, Job
from components.core.model import TesseraForCausalLM
from components.core.points import load_point, save_point
from components.core.schedule import TrainConfig, learning_rate
from components.search.config import Distillation
from components.search.space import LayerSpace, Part, Variant
from components.search.subblock import Subblock
from components.search.variants import Weights
from components.search.watch import Seen, observe

BlockKey = tuple[int, Variant]
"""A variant in its layer."""


def shard_layers(num_layers: int, index: int, count: int) -> range:
    """The layers of shard `index` of `count`: every `count`-th, so that shards are alike."""
    return range(index, num_layers, count)


def variants_to_train(spaces: Sequence[LayerSpace], layers: Iterable[int]) -> list[BlockKey]:
    """Every variant of these layers that needs weights of its own."""
    return [
        (layer, variant)
        for layer in layers
        for variant in (*spaces[layer].trained("attention"), *spaces[layer].trained("ffn"))
    ]


def normalised_mse(parent_ND: Tensor, child_ND: Tensor) -> Tensor:
    """MSE(parent, child) / MSE(parent, 0): 0 is a perfect copy, 1 is as good as nothing."""
    return (parent_ND - child_ND).square().sum() / parent_ND.square().sum()


def distil(
    parent: TesseraForCausalLM,
    students: Mapping[BlockKey, Subblock],
    stream: PackedStream,
    batch_size: int,
    config: Distillation,
    job: Job,
) -> list[list[float]]:
    """Train all students in place, side by side.

    Args:
        parent: frozen; feeds and teaches them.
        students: initialised variants.
        stream: packed training text.
        batch_size: packed rows a step.
        config: steps and learning rate.
        job: takes progress, keeps resume points, says when to stop.

    Returns:
        For each step the normalised error of each student, in their order.

    Raises:
        Interrupted: the job was asked to stop; a resume point was saved.
    """
    together = nn.ModuleList(students.values())
    optimizer = torch.optim.AdamW(together.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    schedule = TrainConfig(
        num_steps=max(1, config.num_steps),
        learning_rate=config.learning_rate,
        warmup_fraction=config.warmup_fraction,
    )
    point = load_point(job, together, optimizer)
    losses: list[list[float]] = [] if point is None else point[1]["losses"]
    job.resume.interval_s = config.resume_interval_s
    layers = sorted({layer for layer, _ in students})
    while len(losses) < config.num_steps and students:
        step = len(losses)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step)
        batch = stream.batch(step * batch_size, batch_size)
        seen, _ = observe(parent, batch, layers)
        losses.append(_teach(students, seen, batch.segment_ids_BT > 0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        mean = sum(losses[-1]) / len(losses[-1])
        job.progress(len(losses), config.num_steps, "block library", error=mean)
        if (job.stopping() or job.resume.due()) and len(losses) < config.num_steps:
            save_point(job, len(losses), together, optimizer, {"losses": losses})
            if job.stopping():
                raise Interrupted
    return losses


def _teach(
    students: Mapping[BlockKey, Subblock], seen: Mapping[tuple[int, Part], Seen], mask_BT: Tensor
) -> list[float]:
    """Add each student's gradient of its own error; returns the errors."""
    errors = []
    for (layer, variant), student in students.items():
        lesson = seen[layer, variant.part]
        error = normalised_mse(lesson.output_BTD[mask_BT], student(lesson.hidden_BTD, lesson.context)[mask_BT])
        error.backward()
        errors.append(float(error.detach()))
    return errors


def save_block(folder: Path, key: BlockKey, weights: Weights) -> None:
    """Write one variant as a file of its own, so that models that share it share the bytes."""
    path = block_path(folder, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, path)


def load_block(folders: Iterable[Path], key: BlockKey) -> Weights:
    """Read one variant from the library folder that has it.

    Raises:
        FileNotFoundError: none has it.
    """
    for folder in folders:
        path = block_path(folder, key)
        if path.is_file():
            return load_file(path)
    raise FileNotFoundError(f"no library has {block_path(Path(), key)}")


def block_path(folder: Path, key: BlockKey) -> Path:
    """Where a library keeps a variant."""
    layer, variant = key
    return folder / f"layer-{layer}" / f"{variant.name}.safetensors"
