"""Variants in training: a layer's are made when it is first reached, and let go once they are written.

No gradient passes from one variant to another, so each layer has an optimizer of its own, and one layer may be steps
ahead of the next.
"""

import json
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from components.core.runtime.context import Interrupted, StageContext
from components.core.training.train_config import TrainConfig, learning_rate
from components.search.config import Distillation
from components.search.library.activations import SubblockIO
from components.search.space.layer_space import Part, Variant
from components.search.space.library_files import BlockKey, save_block
from components.search.space.subblock import Subblock

STATE = "lessons.json"


def normalised_mse(parent_ND: Tensor, child_ND: Tensor) -> Tensor:
    """MSE(parent, child) / MSE(parent, 0): 0 is a perfect copy, 1 is as good as nothing."""
    return (parent_ND - child_ND).float().square().sum() / parent_ND.float().square().sum()


def is_settled(errors: Sequence[float], config: Distillation) -> bool:
    """Whether a variant with these errors, one a step so far, is not to be taught any more."""
    window = config.early_stop_window
    if errors and errors[0] < config.skip_below_error:
        return True
    if window is None or len(errors) < 2 * window:
        return False
    before, now = statistics.fmean(errors[-2 * window : -window]), statistics.fmean(errors[-window:])
    return now > (1 - config.early_stop_min_improvement) * before


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
        tensors = {name: parameter.detach().contiguous() for name, parameter in self.parameters.items()}
        for name, parameter in self.parameters.items():
            tensors |= {f"{name}/{moment}": tensor for moment, tensor in self.optimizer.state[parameter].items()}
        save_file(tensors, file)

    @torch.no_grad()
    def load(self, file: Path) -> None:
        """Read what `save` wrote."""
        for name, tensor in load_file(file).items():
            if name in self.parameters:
                self.parameters[name].copy_(tensor)
            else:
                parameter, _, moment = name.rpartition("/")
                self.optimizer.state[self.parameters[parameter]][moment] = tensor


class BlockTrainer:
    """All variants of a share of the layers.

    Attributes:
        layers: those that have variants, in order.
        errors: of each variant, one for each step that it was taught in.
        ended: layers whose variants are written.
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
            make: initialises one.
            folder: takes the weights.
            config: steps, learning rate, when to stop.
            context: keeps resume points, says when to stop.
        """
        self.keys, self.layers = keys, sorted({layer for layer, _ in keys})
        self.make, self.folder, self.config, self.context = make, folder, config, context
        self.errors: dict[BlockKey, list[float]] = {key: [] for key in keys}
        self.ended: set[int] = set()
        self._steps = dict.fromkeys(self.layers, 0)
        self._classes: dict[int, _LayerVariants] = {}
        self._schedule = TrainConfig(
            num_steps=max(1, config.num_steps),
            learning_rate=config.learning_rate,
            warmup_fraction=config.warmup_fraction,
        )
        context.resume.interval_s = config.resume_interval_s
        self._go_on()

    def has_before(self, step: int) -> bool:
        """Whether some layer has a step before this one to take."""
        return any(taken < step for taken in self._steps.values())

    def has(self, layer: int, step: int) -> bool:
        """Whether a layer is to be taught this step now."""
        return self._steps.get(layer) == step

    def teach(self, layer: int, step: int, seen: Mapping[Part, SubblockIO], mask_BT: Tensor) -> None:
        """Take one step with each variant of a layer that is not settled.

        Raises:
            Interrupted: the stage was asked to stop; a checkpoint was saved.
        """
        if layer not in self._classes:
            self._classes[layer] = self._begin(layer)
        here = self._classes[layer]
        for group in here.optimizer.param_groups:
            group["lr"] = learning_rate(self._schedule, step)
        for variant, student in here.students.items():
            errors = self.errors[layer, variant]
            if not is_settled(errors, self.config):
                lesson = seen[variant.part]
                error = normalised_mse(lesson.output_BTD[mask_BT], student(lesson.hidden_BTD, lesson.context)[mask_BT])
                errors.append(float(error.detach()))
                if not is_settled(errors, self.config):
                    error.backward()
        here.optimizer.step()
        here.optimizer.zero_grad(set_to_none=True)
        self._steps[layer] = step + 1
        if (self.context.stopping() or self.context.resume.due()) and self.has_before(self.config.num_steps):
            self.context.resume.save(sum(self._steps.values()), self._save)
            if self.context.stopping():
                raise Interrupted

    def end(self, layer: int) -> None:
        """Write the variants of a layer, and let them go."""
        if layer not in self.ended:
            here = self._classes.pop(layer, None) or self._begin(layer)
            for variant, student in here.students.items():
                save_block(self.folder, (layer, variant), student.weights())
            self.ended.add(layer)

    def mean_error(self) -> float:
        """Mean of the last error of each variant that has been taught."""
        return statistics.fmean(errors[-1] for errors in self.errors.values() if errors)

    def _begin(self, layer: int) -> _LayerVariants:
        return _LayerVariants({key[1]: self.make(key) for key in self.keys if key[0] == layer}, self.config)

    def _save(self, point: Path) -> None:
        """Fill a resume point; weights that are written already are linked."""
        for layer in self.ended:
            shutil.copytree(self.folder / f"layer-{layer}", point / f"layer-{layer}", copy_function=_link)
        for layer, here in self._classes.items():
            here.save(point / f"layer-{layer}.safetensors")
        errors = {_name(key): values for key, values in self.errors.items()}
        steps = [self._steps[layer] for layer in self.layers]
        (point / STATE).write_text(json.dumps({"errors": errors, "steps": steps, "ended": sorted(self.ended)}))

    def _go_on(self) -> None:
        """Take over the newest resume point, where it is of these variants."""
        point = self.context.resume.latest()
        if point is None or not (point / STATE).exists():
            return
        saved = json.loads((point / STATE).read_text())
        if saved["errors"].keys() != set(map(_name, self.keys)):
            return
        self.errors = {key: saved["errors"][_name(key)] for key in self.keys}
        self._steps = dict(zip(self.layers, saved["steps"], strict=True))
        for layer in self.layers:
            if layer in saved["ended"]:
                shutil.copytree(point / f"layer-{layer}", self.folder / f"layer-{layer}", copy_function=_link)
                self.ended.add(layer)
            elif self._steps[layer]:
                self._classes[layer] = self._begin(layer)
                self._classes[layer].load(point / f"layer-{layer}.safetensors")
        self.context.note(f"goes on with the block library after {int(point.name)} steps of layers")


def _name(key: BlockKey) -> str:
    return f"{key[0]}/{key[1].name}"


def _link(source: str, target: str) -> None:
    """A second name for a file that is not changed any more, or a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
