"""Floating-point operations of scoring, counted: two for each multiplication with addition of a matrix product."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from components.core.model.decoder import Attention
from components.core.text.packing import Batch
from components.search.space.layer_space import Part
from components.search.space.library_files import BlockKey
from components.search.space.subblock import Subblock

Slot = tuple[int, Part]
"""The attention or the FFN of a layer."""


@dataclass
class Flops:
    """Operations of matrix products and attention.

    Attributes:
        spent: by scoring.
        naive: that one forward pass of a whole model a variant would have taken, head included.
    """

    spent: int = 0
    naive: int = 0

    @property
    def share(self) -> float:
        """Part of the naive work that was done; 0 before any."""
        return self.spent / self.naive if self.naive else 0.0


def subblock_flops(block: Subblock | None, rows: int, tokens: int, positions: int | None = None) -> int:
    """One run of a sub-block.

    Args:
        block: None is the no-op.
        rows: sequences.
        tokens: of each; attention looks from each of them at all of them, as masked attention is computed.
        positions: that it is run on; all tokens of all rows where not given.
    """
    if block is None:
        return 0
    attention = block.module if isinstance(block.module, Attention) else None
    pairs = 0 if attention is None else 4 * attention.num_heads * attention.head_dim * rows * tokens**2
    return linear_flops(block, rows * tokens if positions is None else positions) + pairs


def linear_flops(module: nn.Module, positions: int) -> int:
    """All matrices of a module, each run once on every position."""
    matrices = (part for part in module.modules() if isinstance(part, nn.Linear))
    return sum(2 * matrix.in_features * matrix.out_features * positions for matrix in matrices)


def naive_flops(
    own: Mapping[Slot, Subblock | None],
    replacements: Mapping[BlockKey, Subblock | None],
    lm_head: nn.Module,
    batch: Batch,
) -> int:
    """A forward pass of a whole model, head included, for each replacement.

    Args:
        own: the parent's sub-blocks.
        replacements: what takes their place.
        lm_head: of the parent.
        batch: the text.
    """
    rows, tokens = batch.input_ids_BT.shape
    each = {slot: subblock_flops(block, rows, tokens) for slot, block in own.items()}
    whole = sum(each.values()) + linear_flops(lm_head, rows * tokens)
    return sum(
        whole - each[layer, variant.part] + subblock_flops(block, rows, tokens)
        for (layer, variant), block in replacements.items()
    )
