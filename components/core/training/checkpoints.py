"""Resume points of training: model, optimizer and randomness, whole, so that any number of ranks can go on."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from components.core.runtime.context import StageContext

_GATHER = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCATTER = StateDictOptions(full_state_dict=True)
_SEPARATOR = "/"
"""Between the name of a parameter and the name of one of its moments; torch's own flattening cannot be read back
(2.13)."""


def save_point(
    context: StageContext, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Save everything needed to go on after `step`; collective where there are several ranks, written by rank 0.

    Training stands still while values are copied in memory; they are written while it goes on, or before the return
    where the job is to stop. The copies of one point take the memory of those of the last.
    """
    context.resume.wait()
    weights: dict[str, Any] = get_model_state_dict(model, options=_GATHER)
    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_GATHER)
    if context.rank > 0:
        return
    optimizer_state = {
        f"{parameter}{_SEPARATOR}{moment}": tensor
        for parameter, held in moments["state"].items()
        for moment, tensor in held.items()
    }
    tensors = {
        "model": _copied(weights, context.resume.memory),
        "optimizer": _copied(optimizer_state, context.resume.memory),
        "random": {"torch": torch.get_rng_state()},
    }
    text = json.dumps({"state": state, "param_groups": moments["param_groups"]})

    def write(folder: Path) -> None:
        for name, values in tensors.items():
            save_file(values, folder / f"{name}.safetensors")
        (folder / "state.json").write_text(text)

    context.resume.save_in_background(step, write)
    if context.stopping():
        context.resume.wait()


def load_point(
    context: StageContext, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest resume point into model and optimizer.

    Returns:
        The step it was saved after and the state saved with it, or None where there is no point.
    """
    point = context.resume.latest()
    if point is None:
        return None
    saved = json.loads((point / "state.json").read_text())
    weights: dict[str, Any] = load_file(point / "model.safetensors")
    set_model_state_dict(model, weights, options=_SCATTER)
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(point / "optimizer.safetensors").items():
        parameter, _, moment = name.rpartition(_SEPARATOR)
        moments.setdefault(parameter, {})[moment] = tensor
    whole = {"state": moments, "param_groups": saved["param_groups"]}
    set_optimizer_state_dict(model, optimizer, whole, options=_SCATTER)
    torch.set_rng_state(load_file(point / "random.safetensors")["torch"])
    context.note(f"goes on from step {int(point.name)}")
    return int(point.name), saved["state"]


def _copied(values: dict[str, Any], memory: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors among `values`, laid out as safetensors wants them; shared storage (tied embeddings) is copied.

    New memory would have to be got from the system page by page, which takes several times as long as the copy.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        held = memory.get(name)
        if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
            memory[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        memory[name].copy_(tensor)
    return {name: memory[name] for name in tensors}
