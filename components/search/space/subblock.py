"""A sub-block that runs on its own: norm and module, without the residual."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from components.search.space.layer_space import Part
from components.search.space.variant_weights import MODULES, Weights


class Subblock(nn.Module):
    """The attention or the FFN of a layer, with its norm.

    Attributes:
        part: which of the two.
        storage_dtype: precision of the weights that `weights` returns; that of the module where None.
    """

    def __init__(self, part: Part, norm: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self.part = part
        self.storage_dtype: torch.dtype | None = None
        self.norm, self.module = norm, module

    @classmethod
    def of(cls, layer: nn.Module, part: Part) -> Self | None:
        """The sub-block of a decoder layer, sharing its weights; None where it is a no-op."""
        norm, module = (getattr(layer, name) for name in MODULES[part])
        return None if module is None else cls(part, norm, module)

    def forward(self, hidden_BTD: Tensor, context: tuple[Any, ...]) -> Tensor:
        """What is added to the residual stream.

        Args:
            hidden_BTD: the residual stream.
            context: what the module is given beside hidden states: positions and mask.
        """
        output_BTD: Tensor = self.module(self.norm(hidden_BTD), *context)
        return output_BTD

    def weights(self) -> Weights:
        """Tensors by their name within a layer, at the precision that they came with."""
        return {
            self._outside(name): tensor.to(self.storage_dtype or tensor.dtype)
            for name, tensor in self.state_dict().items()
        }

    def load_weights(self, weights: Weights, *, training: bool) -> None:
        """Take tensors that are named as within a layer: copies in float32 to be trained, or the very tensors."""
        state = {name: weights[self._outside(name)].detach() for name in self.state_dict()}
        if training:
            self.storage_dtype = next(iter(state.values())).dtype
            state = {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
        self.load_state_dict(state, assign=True)
        self.requires_grad_(training)

    def _outside(self, name: str) -> str:
        """The name within a layer of a tensor of this module."""
        own, _, rest = name.partition(".")
        norm, module = MODULES[self.part]
        return f"{norm if own == 'norm' else module}.{rest}"
