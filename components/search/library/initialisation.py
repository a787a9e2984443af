"""Starts of the variants, computed on calibration text before any training.

Channel importance decides which channels a narrower FFN keeps: how much each channel moves the FFN's output.

A linear variant is the matrix that comes closest to the parent's sub-block. The paper begins with a product of the
parent's matrices, which ignores softmax and gate, and on a trained parent is often worse than a no-op. Least squares on
calibration text has at once the error that training the product would reach there.

Shape letters: B rows, T tokens, D hidden size, I channels, N tokens that are no padding.
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
from components.search.library.calibration import iterate_layers
from components.search.space.layer_space import Part
from components.search.space.library_table import LayerImportance
from components.search.space.subblocks import LINEAR_WEIGHT, MODULES, BlockKey, save_block, subblock_weights

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
    masks_BT = [batch.segment_ids_BT.to(parent.device) > 0 for batch in batches]
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
    save_file({f"layer-{i}": tensor.cpu() for i, tensor in contributions.items()}, folder / FILE)


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


RIDGE = 1e-3
"""Weight of small matrices against small errors, as a share of the mean square of the inputs."""


class LeastSquares:
    """The matrix that maps inputs to outputs with the least square error, from sums over tokens."""

    def __init__(self) -> None:
        self.inputs_DD = self.products_DD = torch.zeros(())

    def add(self, inputs_ND: Tensor, outputs_ND: Tensor) -> None:
        """Add the sums of more tokens."""
        inputs_ND, outputs_ND = inputs_ND.double(), outputs_ND.double()
        self.inputs_DD = self.inputs_DD + inputs_ND.T @ inputs_ND
        self.products_DD = self.products_DD + inputs_ND.T @ outputs_ND

    def matrix(self) -> Tensor:
        """The matrix as a linear layer holds it, (D of the output, D of the input), in float64."""
        ridge = RIDGE * self.inputs_DD.diagonal().mean()
        matrix_DD: Tensor = torch.linalg.solve(
            self.inputs_DD + ridge * torch.eye(len(self.inputs_DD), device=self.inputs_DD.device), self.products_DD
        )
        return matrix_DD.T


@torch.no_grad()
def fit_linear(
    parent: TesseraForCausalLM, keys: Sequence[BlockKey], batches: Sequence[Batch], folder: Path, context: StageContext
) -> None:
    """Write the linear ones among some variants, each with the norm of the parent's own sub-block.

    Args:
        parent: frozen; the teacher.
        keys: variants.
        batches: calibration text.
        folder: one file per variant is written there.
        context: gives scratch space for hidden states.
    """
    linear = [key for key in keys if key[1].is_linear]
    if not linear or not batches:
        return
    fits: dict[BlockKey, LeastSquares] = {}
    for layer, number, ios in iterate_layers(parent, batches, max(layer for layer, _ in linear) + 1, context):
        for key in [key for key in linear if key[0] == layer]:
            part, io = key[1].part, ios[key[1].part]
            mask_BT = batches[number].segment_ids_BT.to(parent.device) > 0
            norm: nn.Module = getattr(parent.model.layers[layer], MODULES[part][0])
            fits.setdefault(key, LeastSquares()).add(norm(io.hidden_BTD)[mask_BT], io.output_BTD[mask_BT])
            if number == len(batches) - 1:
                _write(parent, key, fits.pop(key).matrix(), folder)


def _write(parent: TesseraForCausalLM, key: BlockKey, matrix_DD: Tensor, folder: Path) -> None:
    layer, variant = key
    part: Part = variant.part
    own = subblock_weights(parent.model.layers[layer].state_dict(), part)
    norm, module = MODULES[part]
    scale = own[f"{norm}.weight"]
    save_block(folder, key, {f"{norm}.weight": scale, f"{module}.{LINEAR_WEIGHT[part]}": matrix_DD.to(scale.dtype)})
