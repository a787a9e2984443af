"""Resume points of training: model, optimizer and random state, unsharded, so that any number of ranks can resume."""

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
"""Separates the name of a parameter from that of its moment. Torch can flatten an optimizer's state itself, but torch
2.13 cannot read it back."""


def save_point(
    context: StageContext, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Save everything that a run needs to resume after `step`. Every rank calls it; rank 0 writes.

    The values are copied in memory, and training goes on while the copies are written. If the stage is asked to stop,
    the function returns after they are written. Each resume point reuses the memory of the copies before it.
    """
    context.resume.wait()
    weights: dict[str, Any] = get_model_state_dict(model, options=_GATHER)
    moments: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_GATHER)
    if context.rank > 0:
        return
    optimizer_state = {
        f"{parameter}{_SEPARATOR}{moment}": tensor
        for parameter, values in moments["state"].items()
        for moment, tensor in values.items()
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
        The step after which it was saved, and the state saved with it; None if there is no resume point.
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
    unsharded = {"state": moments, "param_groups": saved["param_groups"]}
    set_optimizer_state_dict(model, optimizer, unsharded, options=_SCATTER)
    torch.set_rng_state(load_file(point / "random.safetensors")["torch"])
    context.note(f"goes on from step {int(point.name)}")
    return int(point.name), saved["state"]


def _copied(values: dict[str, Any], memory: dict[str, Any]) -> dict[str, Tensor]:
    """Contiguous copies of the tensors among `values`, in the buffers of `memory`, each with storage of its own.

    The buffers are reused, because the system hands out new memory page by page, which takes several times as long as
    the copy.
    """
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        buffer = memory.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            memory[name] = torch.empty_like(tensor, memory_format=torch.contiguous_format)
        memory[name].copy_(tensor)
    return {name: memory[name] for name in tensors}
