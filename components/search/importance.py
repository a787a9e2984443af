"""Channel contribution: how much each FFN channel moves the FFN's output.

Shape letters: B rows, T tokens, D hidden size, I channels.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from components.core.batches import Batch
from components.core.job import Job
from components.core.model import Mlp, TesseraForCausalLM

FILE = "importance.safetensors"


@torch.no_grad()
def channel_contributions(parent: TesseraForCausalLM, batches: Sequence[Batch], job: Job) -> dict[int, Tensor]:
    """Mean contribution of every FFN channel over calibration tokens, by layer.

    C_i = |X_i| * ||W_down[:, i]||: the distance between the FFN's output with the channel and without it, X being what
    enters the down projection.

    Source: arXiv 2411.19146, appendix A.
    """
    downs = {i: layer.mlp.down_proj for i, layer in enumerate(parent.model.layers) if isinstance(layer.mlp, Mlp)}
    sums_I = {i: torch.zeros(down.in_features, dtype=torch.float64) for i, down in downs.items()}
    tokens = 0
    for done, batch in enumerate(batches, 1):
        mask_BT = batch.segment_ids_BT > 0
        with ExitStack() as hooks:
            for i, down in downs.items():
                hooks.enter_context(_adding_inputs(down, mask_BT, sums_I[i]))
            parent.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
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


def _adding_inputs(module: nn.Module, mask_BT: Tensor, sum_I: Tensor) -> RemovableHandle:
    """While in scope, add the absolute inputs of a module at the masked tokens to `sum_I`."""

    def add(_: nn.Module, args: tuple[Tensor]) -> None:
        sum_I.add_(args[0][mask_BT].abs().sum(dim=0, dtype=torch.float64))

    return module.register_forward_pre_hook(add)
