"""Channel contribution: how much each FFN channel moves the FFN's output.

Shape letters: B rows, T tokens, D hidden size, I channels.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.core.batches import Batch
from components.core.job import Job
from components.core.model import TesseraForCausalLM

FILE = "importance.safetensors"


@torch.no_grad()
def channel_contributions(parent: TesseraForCausalLM, batches: Sequence[Batch], job: Job) -> dict[int, Tensor]:
    """Mean contribution of every FFN channel over calibration tokens, by layer.

    C_i = |X_i| * ||W_down[:, i]||: the distance between the FFN's output with the channel and without it, X being what enters the
    down projection.

    Source: arXiv 2411.19146, appendix A.
    """
    downs = {i: layer.mlp.down_proj for i, layer in enumerate(parent.model.layers) if layer.mlp is not None}
    sums_I = {i: torch.zeros(down.in_features, dtype=torch.float64) for i, down in downs.items()}
    tokens = 0
    for done, batch in enumerate(batches, 1):
        mask_BT = batch.segment_ids_BT > 0
        with Inputs(downs) as inputs:
            parent.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
        for i, x_BTI in inputs.seen.items():
            sums_I[i] += x_BTI[mask_BT].abs().sum(dim=0, dtype=torch.float64)
        tokens += int(mask_BT.sum())
        job.progress(done, len(batches), "channel importance")
    return {i: (sums_I[i] / tokens * down.weight.double().norm(dim=0)).float() for i, down in downs.items()}


def save_importance(contributions: dict[int, Tensor], folder: Path) -> None:
    """Write one tensor a layer."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({f"layer-{i}": tensor for i, tensor in contributions.items()}, folder / FILE)


def load_importance(folder: Path) -> dict[int, Tensor]:
    """Read what `save_importance` wrote."""
    return {int(name.removeprefix("layer-")): tensor for name, tensor in load_file(folder / FILE).items()}


def share_of_top(contributions_I: Tensor, fraction: float) -> float:
    """Which share of all contribution the most important `fraction` of the channels holds."""
    ranked_I = contributions_I.sort(descending=True).values
    return float(ranked_I[: round(fraction * len(ranked_I))].sum() / ranked_I.sum())


class Inputs:
    """Keeps the last input of each module while in scope."""

    def __init__(self, modules: dict[int, nn.Module]) -> None:
        self.seen: dict[int, Tensor] = {}
        self._modules = modules

    def __enter__(self) -> "Inputs":
        self._handles = [
            module.register_forward_pre_hook(lambda _, args, i=i: self.seen.__setitem__(i, args[0]))
            for i, module in self._modules.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
