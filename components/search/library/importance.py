"""Channel contribution: how much each FFN channel moves the FFN's output.

Shape letters: B rows, T tokens, D hidden size, I channels.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from components.core.model.decoder import Mlp, TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch
from components.search.library.activations import iterate_layers

FILE = "importance.safetensors"


@torch.no_grad()
def channel_contributions(
    parent: TesseraForCausalLM, batches: Sequence[Batch], context: StageContext
) -> dict[int, Tensor]:
    """Mean contribution of every FFN channel over calibration tokens, by layer.

    C_i = |X_i| * ||W_down[:, i]||: the distance between the FFN's output with the channel and without it, X being what
    enters the down projection.

    Source: arXiv 2411.19146, appendix A.
    """
    downs = {i: layer.mlp.down_proj for i, layer in enumerate(parent.model.layers) if isinstance(layer.mlp, Mlp)}
    masks_BT = [batch.segment_ids_BT > 0 for batch in batches]
    tokens = sum(int(mask_BT.sum()) for mask_BT in masks_BT)
    found: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        entered = {i: hooks.enter_context(_watching(down)) for i, down in downs.items()}
        for i, number, _ in iterate_layers(parent, batches, len(parent.model.layers), context):
            if i not in downs:
                continue
            sum_I = entered[i].pop()[masks_BT[number]].abs().sum(dim=0, dtype=torch.float64)
            found[i] = found[i] + sum_I if i in found else sum_I
            if number == len(batches) - 1:
                found[i] = (found[i] / tokens * downs[i].weight.double().norm(dim=0)).float()
                context.progress(i + 1, len(parent.model.layers), "channel importance")
    return found


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


@contextmanager
def _watching(module: nn.Module) -> Iterator[list[Tensor]]:
    """While in scope, put what enters a module into the list."""
    entered: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Tensor]) -> None:
        entered.append(args[0])

    with module.register_forward_pre_hook(keep):
        yield entered
