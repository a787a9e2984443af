"""The block library: every variant of every sub-block, trained on its own to reproduce the parent's sub-block.

Decoupled blockwise local distillation: the input of a variant is the parent's activations, its target is the output of
the parent's sub-block. No gradient passes from one variant to another, so one forward pass of the parent serves them
all, each layer has its own optimizer, and one layer may be steps ahead of the next. The variants of a layer are created
when it is first reached, and freed once they are written. The parent's own sub-blocks and the no-ops need no training.

Source: arXiv 2411.19146, section 3.
"""

import json
import os
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.core.model.decoder import TesseraForCausalLM
from components.core.model.layer_files import is_paged
from components.core.runtime.context import Interrupted, StageContext
from components.core.text.packing import RowStream
from components.core.training.train_config import TrainConfig, learning_rate
from components.search.config import Distillation
from components.search.library.calibration import SubblockIO, iterate_layers
from components.search.space.layer_space import LayerSpace, Part, Variant
from components.search.space.subblocks import BlockKey, Subblock, block_name, save_block

STATE = "block-trainer.json"


def normalised_mse(parent_ND: Tensor, child_ND: Tensor) -> Tensor:
    """MSE(parent, child) / MSE(parent, 0): 0 is a perfect copy, 1 is as good as nothing."""
    return (parent_ND - child_ND).float().square().sum() / parent_ND.float().square().sum()


class _LayerVariants:
    """The variants of one layer, with their optimizer."""

    def __init__(self, students: Mapping[Variant, Subblock], config: Distillation) -> None:
        self.students = students
        self.parameters = {
            f"{variant.name}/{name}": parameter
            for variant, student in students.items()
            for name, parameter in student.named_parameters()
        }
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=config.learning_rate, weight_decay=0.0, fused=True
        )

    def save(self, file: Path) -> None:
        """Write weights and moments."""
        tensors = {name: parameter.detach() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{name}/{moment}": tensor for moment, tensor in self.optimizer.state[parameter].items()}
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        for name, tensor in load_file(file).items():
            if name in self.parameters:
                self.parameters[name].copy_(tensor)
            else:
                parameter, _, moment = name.rpartition("/")
                owner = self.parameters[parameter]
                self.optimizer.state[owner][moment] = tensor.to(owner.device)


class BlockTrainer:
    """Training of all variants of a share of the layers.

    Attributes:
        layers: those that have variants, in order.
        errors: normalised error of each variant, one for each training step.
        finished: layers whose variants are written.
    """

    def __init__(
        self,
        keys: Sequence[BlockKey],
        make: Callable[[BlockKey], Subblock],
        folder: Path,
        config: Distillation,
        context: StageContext,
    ) -> None:
        """Begin, or go on from a resume point.

        Args:
            keys: the variants.
            make: initialises a variant.
            folder: the weights are written there.
            config: steps, learning rate, and the error below which a variant is not trained.
            context: stores resume points, and tells when the stage must stop.
        """
        self.keys, self.layers = keys, sorted({layer for layer, _ in keys})
        self.make, self.folder, self.config, self.context = make, folder, config, context
        self.errors: dict[BlockKey, list[float]] = {key: [] for key in keys}
        self.finished: set[int] = set()
        self._steps = dict.fromkeys(self.layers, 0)
        self._variants: dict[int, _LayerVariants] = {}
        self._schedule = TrainConfig(
            num_steps=max(1, config.num_steps),
            learning_rate=config.learning_rate,
            warmup_fraction=config.warmup_fraction,
        )
        context.resume.interval_s = config.resume_interval_s
        self._resume()

    def is_behind(self, step: int) -> bool:
        """Whether some layer has taken fewer steps than this."""
        return any(taken < step for taken in self._steps.values())

    def is_next(self, layer: int, step: int) -> bool:
        """Whether this is the step that a layer takes next."""
        return self._steps.get(layer) == step

    def train_step(self, layer: int, step: int, ios: Mapping[Part, SubblockIO], mask_BT: Tensor) -> None:
        """Take one step with the variants of a layer; one whose first error is small enough stays as initialised.

        Raises:
            Interrupted: the stage was asked to stop; a checkpoint was saved.
        """
        if layer not in self._variants:
            self._variants[layer] = self._begin(layer)
        here = self._variants[layer]
        for group in here.optimizer.param_groups:
            group["lr"] = learning_rate(self._schedule, step)
        for variant, student in here.students.items():
            errors = self.errors[layer, variant]
            if not self._is_good_enough(errors):
                io = ios[variant.part]
                error = normalised_mse(io.output_BTD[mask_BT], student(io.hidden_BTD, io.context)[mask_BT])
                errors.append(float(error.detach()))
                if not self._is_good_enough(errors):
                    error.backward()
        here.optimizer.step()
        here.optimizer.zero_grad(set_to_none=True)
        self._steps[layer] = step + 1
        if (self.context.stopping() or self.context.resume.due()) and self.is_behind(self.config.num_steps):
            self.context.resume.save(sum(self._steps.values()), self._save)
            if self.context.stopping():
                raise Interrupted

    def finish_layer(self, layer: int) -> None:
        """Write the variants of a layer, and free their memory."""
        if layer not in self.finished:
            here = self._variants.pop(layer, None) or self._begin(layer)
            for variant, student in here.students.items():
                save_block(self.folder, (layer, variant), student.weights())
            self.finished.add(layer)

    def mean_error(self) -> float:
        """Mean over the variants of the last error of each."""
        return statistics.fmean(errors[-1] for errors in self.errors.values() if errors)

    def _is_good_enough(self, errors: Sequence[float]) -> bool:
        """Whether a variant with these errors is left as it was initialised."""
        return bool(errors) and errors[0] < self.config.skip_below_error

    def _begin(self, layer: int) -> _LayerVariants:
        return _LayerVariants({key[1]: self.make(key) for key in self.keys if key[0] == layer}, self.config)

    def _save(self, point: Path) -> None:
        """Fill a resume point; weights that are already written are hard links."""
        for layer in self.finished:
            shutil.copytree(self.folder / f"layer-{layer}", point / f"layer-{layer}", copy_function=_link)
        for layer, here in self._variants.items():
            here.save(point / f"layer-{layer}.safetensors")
        errors = {block_name(key): values for key, values in self.errors.items()}
        steps = [self._steps[layer] for layer in self.layers]
        (point / STATE).write_text(json.dumps({"errors": errors, "steps": steps, "finished": sorted(self.finished)}))

    def _resume(self) -> None:
        """Load the newest resume point if it has the same variants."""
        point = self.context.resume.latest()
        if point is None or not (point / STATE).exists():
            return
        saved = json.loads((point / STATE).read_text())
        if saved["errors"].keys() != set(map(block_name, self.keys)):
            return
        self.errors = {key: saved["errors"][block_name(key)] for key in self.keys}
        self._steps = dict(zip(self.layers, saved["steps"], strict=True))
        for layer in self.layers:
            if layer in saved["finished"]:
                shutil.copytree(point / f"layer-{layer}", self.folder / f"layer-{layer}", copy_function=_link)
                self.finished.add(layer)
            elif self._steps[layer]:
                self._variants[layer] = self._begin(layer)
                self._variants[layer].load(point / f"layer-{layer}.safetensors")
        self.context.note(f"goes on with the block library after {int(point.name)} steps of layers")


def _link(source: str, target: str) -> None:
    """Hard-link a file that does not change any more; copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


WHAT = "block library"


def shard_layers(num_layers: int, index: int, count: int) -> range:
    """The layers of shard `index` of `count`: every `count`-th, so that shards take equally long."""
    return range(index, num_layers, count)


def variants_to_train(spaces: Sequence[LayerSpace], layers: Iterable[int]) -> list[BlockKey]:
    """Every variant of these layers that needs weights of its own."""
    return [
        (layer, variant)
        for layer in layers
        for variant in (*spaces[layer].trained("attention"), *spaces[layer].trained("ffn"))
    ]


def distil(
    parent: TesseraForCausalLM,
    keys: Sequence[BlockKey],
    make: Callable[[BlockKey], Subblock],
    folder: Path,
    stream: RowStream,
    batch_size: int,
    config: Distillation,
    context: StageContext,
) -> dict[BlockKey, list[float]]:
    """Train variants in one pass over the text, and write them.

    A parent in memory takes one batch at a time through all layers. A paged parent takes all batches through a layer
    before the next layer is read, and only the variants of that layer are in memory. The results are the same.

    Args:
        parent: frozen; the teacher.
        keys: the variants.
        make: initialises a variant.
        folder: the weights are written there.
        stream: packed training text.
        batch_size: packed rows a step.
        config: steps, learning rate, and the error below which a variant is not trained.
        context: takes progress, stores resume points, and tells when the stage must stop.

    Returns:
        The normalised error of each variant, one for each training step.

    Raises:
        Interrupted: the stage was asked to stop; a checkpoint was saved.
    """
    trainer = BlockTrainer(keys, make, folder, config, context)
    paged = is_paged(parent.model.layers)
    steps_at_once = config.num_steps if paged else 1
    for first in range(0, config.num_steps if keys else 0, steps_at_once):
        if not trainer.is_behind(first + steps_at_once):
            continue
        batches = [stream.batch(step * batch_size, batch_size) for step in range(first, first + steps_at_once)]
        for layer, number, ios in iterate_layers(parent, batches, trainer.layers[-1] + 1, context):
            if trainer.is_next(layer, first + number):
                mask_BT = batches[number].segment_ids_BT.to(parent.device) > 0
                trainer.train_step(layer, first + number, ios, mask_BT)
            if paged and layer in trainer.layers and number == len(batches) - 1:
                trainer.finish_layer(layer)
                context.progress(len(trainer.finished), len(trainer.layers), WHAT, error=trainer.mean_error())
        if not paged:
            context.progress(first + 1, config.num_steps, WHAT, error=trainer.mean_error())
    for layer in trainer.layers:
        trainer.finish_layer(layer)
    return trainer.errors
