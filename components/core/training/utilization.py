"""How well a training uses its devices: tokens a second, model FLOPs utilization, and time spent waiting for rows."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

from components.core.model.architecture import Architecture
from components.core.model.flops import block_weights


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations that a model needs for a training step, forward and backward, by what is in the step.

    Two for each weight and token forward, four backward. Attention counts the pairs that it lets through, not the
    square of the row; what activation checkpointing computes again does not count, nor does a teacher.

    Attributes:
        of_token: in the matrices of the layers.
        of_target: in the head, for each position that counts in the loss.
        of_pair: in the attentions, for each pair of a token and one that it attends to, itself included.

    Source: arXiv 2204.02311, appendix B.
    """

    of_token: int
    of_target: int
    of_pair: int

    @classmethod
    def of(cls, shape: Architecture) -> "ModelFlops":
        """Count the operations of a model."""
        matrices = sum(block_weights(shape, block) for block in shape.blocks)
        width = sum(block.attends for block in shape.blocks) * shape.num_attention_heads * shape.head_dim
        return cls(of_token=6 * matrices, of_target=6 * shape.vocab_size * shape.hidden_size, of_pair=12 * width)

    def of_step(self, num_tokens: int, num_targets: int, num_pairs: int) -> int:
        """Operations of a step."""
        return self.of_token * num_tokens + self.of_target * num_targets + self.of_pair * num_pairs


class StepMeter:
    """Measures the steps of a training, as this rank sees them.

    Args:
        flops: of the model.
        peak: operations a second that the devices of all ranks can do together; None where that is not known.
    """

    def __init__(self, flops: ModelFlops, peak: float | None) -> None:
        self._flops, self._peak = flops, peak
        self._started = self._step_began = time.monotonic()
        self._waited_s, self._num_tokens = 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The block, with which a step begins, reads the rows of the step."""
        self._step_began = time.monotonic()
        yield
        self._waited_s = time.monotonic() - self._step_began

    def end_step(self, num_tokens: int, num_targets: int, num_pairs: int) -> dict[str, float]:
        """Metrics of the step that has ended.

        Args:
            num_tokens: tokens of all ranks.
            num_targets: of these, how many count in the loss.
            num_pairs: pairs of a token and one that it attends to.

        Returns:
            `tokens_per_s` since the meter was made; `data_stall` of this step, and `mfu` where the peak is known.
        """
        now = time.monotonic()
        step_s = now - self._step_began
        self._num_tokens += num_tokens
        found = {"tokens_per_s": self._num_tokens / (now - self._started), "data_stall": self._waited_s / step_s}
        if self._peak is not None:
            found["mfu"] = self._flops.of_step(num_tokens, num_targets, num_pairs) / (step_s * self._peak)
        return found
