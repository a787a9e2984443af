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
from components.search.library.records import LayerImportance

FILE = "importance.safetensors"


@torch.no_grad()
def channel_contributions(
    parent: TesseraForCausalLM, batches: Sequence[Batch], context: StageContext
) -> dict[int, Tensor]:
    """Mean contribution of every FFN channel over calibration tokens, by layer.

    C_i = |X_i| * ||W_down[:, i]|| is the distance between the FFN's outputs with and without the channel; X is the
    input of the down projection.

    Source: arXiv 2411.19146, appendix A.
    """
    downs = {i: layer.mlp.down_proj for i, layer in enumerate(parent.model.layers) if isinstance(layer.mlp, Mlp)}
    masks_BT = [batch.segment_ids_BT > 0 for batch in batches]
    tokens = sum(int(mask_BT.sum()) for mask_BT in masks_BT)
    found: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        inputs = {i: hooks.enter_context(_recorded_inputs(down)) for i, down in downs.items()}
        for i, number, _ in iterate_layers(parent, batches, len(parent.model.layers), context):
            if i not in downs:
                continue
            sum_I = inputs[i].pop()[masks_BT[number]].abs().sum(dim=0, dtype=torch.float64)
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


def spread_of_importance(contributions: dict[int, Tensor]) -> tuple[LayerImportance, ...]:
    """How contribution spreads over the channels of each layer."""
    return tuple(
        LayerImportance(layer=layer, mean=float(values_I.mean()), top_half_share=share_of_top(values_I, 0.5))
        for layer, values_I in sorted(contributions.items())
    )


def share_of_top(contributions_I: Tensor, fraction: float) -> float:
    """Share of all contribution that comes from the most important `fraction` of the channels."""
    ranked_I = contributions_I.sort(descending=True).values
    return float(ranked_I[: round(fraction * len(ranked_I))].sum() / ranked_I.sum())


@contextmanager
def _recorded_inputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """While in scope, a hook appends each input of a module to the list."""
    inputs: list[Tensor] = []

    def record(_: nn.Module, args: tuple[Tensor]) -> None:
        inputs.append(args[0])

    with module.register_forward_pre_hook(record):
        yield inputs
