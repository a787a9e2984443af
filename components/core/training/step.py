"""One optimizer step: gradients of micro batches summed, clipped, applied. Every stage that trains uses it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from components.core.model.decoder import TesseraForCausalLM

MAX_GRAD_NORM = 1.0
"""Gradients are scaled down to this global norm. Source: arXiv 2307.09288, section 2.2."""

BatchT = TypeVar("BatchT")

LossFunction = Callable[[TesseraForCausalLM, BatchT], dict[str, Tensor]]
"""Sums over the counted positions of one micro batch: `loss`, with gradient, and the terms that the curves show."""


class Objective(nn.Module, Generic[BatchT]):
    """Model and loss as one module, so that sharded parameters are gathered around the whole of it."""

    def __init__(self, model: TesseraForCausalLM, loss_function: LossFunction[BatchT]) -> None:
        super().__init__()
        self.model = model
        self._loss_function = loss_function

    def forward(self, batch: BatchT) -> dict[str, Tensor]:
        """The loss of one micro batch."""
        return self._loss_function(self.model, batch)


@dataclass(frozen=True)
class OptimizerStep(Generic[BatchT]):
    """What an optimizer step needs besides its data.

    Attributes:
        objective: model and loss.
        optimizer: of the model's parameters.
        compute_dtype: type of matrix products; weights and optimizer state stay float32.
        num_ranks: processes that take this step together.
    """

    objective: Objective[BatchT]
    optimizer: torch.optim.Optimizer
    compute_dtype: torch.dtype = torch.float32
    num_ranks: int = 1

    def run(self, micro_batches: Iterable[BatchT], num_targets: int, learning_rate: float) -> dict[str, float]:
        """Step on the mean over the counted positions of all ranks.

        FSDP averages gradients over ranks, so each rank's sum is multiplied by the number of ranks: the step does not
        depend on that number.

        Args:
            micro_batches: of this rank.
            num_targets: counted positions of all ranks.
            learning_rate: of this step.

        Returns:
            Mean of each term of the loss, and the norm of the gradient before clipping as `grad_norm`.
        """
        device = next(self.objective.parameters()).device
        sums: dict[str, Tensor] = {}
        for batch in micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
                terms: dict[str, Tensor] = self.objective(batch)
            (terms["loss"] * (self.num_ranks / num_targets)).backward()
            for name, value in terms.items():
                sums[name] = sums.get(name, torch.zeros((), device=device)) + value.detach().float()
        norm = nn.utils.clip_grad_norm_(self.objective.parameters(), MAX_GRAD_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        means = torch.stack(list(sums.values())) / num_targets
        if self.num_ranks > 1:
            dist.all_reduce(means)
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        values = torch.cat([means, norm.float()[None]]).tolist()  # one transfer from the device
        return dict(zip([*sums, "grad_norm"], values, strict=True))
