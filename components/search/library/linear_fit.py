"""Linear sub-blocks solved before they are trained: the matrix that comes closest to the parent's own sub-block.

The paper begins with a product of the parent's matrices, which forgets softmax and gate, and on a trained parent is
often worse than nothing. Least squares on calibration text gives at once the least error that training comes to there.

Shape letters: B rows, T tokens, D hidden size, N tokens that are no padding.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch
from components.search.library.activations import iterate_layers
from components.search.space.layer_space import Part
from components.search.space.library_files import BlockKey, save_block
from components.search.space.variant_weights import LINEAR_WEIGHT, MODULES, subblock_weights

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
            self.inputs_DD + ridge * torch.eye(len(self.inputs_DD)), self.products_DD
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
            mask_BT = batches[number].segment_ids_BT > 0
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
