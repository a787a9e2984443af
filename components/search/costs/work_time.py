"""Predicted times of a stage's work on a device: training and reading text, and generation. Light: no torch.

Training is bound by products of matrices, which are a share of a step (`TRAINED`); then by the optimizer, which reads
and writes its state once a step. Generation is that of the roofline model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from components.core.model.accelerators import Device, Dtype
from components.core.model.architecture import Architecture, BlockConfig
from components.core.model.flops import block_flops, forward_flops
from components.search.config import Measurement
from components.search.costs.roofline import COMPUTED, STREAMED, predicted_model
from components.search.space.layer_space import PARTS, LayerSpace, Variant, block_of

TRAINED = 0.6
"""Share of a training step that is products of matrices: half at 2 M parameters, two thirds at 135 M, on a CPU
(`tests/bench/training.md`). With `COMPUTED` it is 42 % of the peak on a GPU; Llama 3 reached 38 to 43 %
(arXiv 2407.21783, section 3.3.2)."""
OPTIMIZER_BYTES = 36
"""Bytes that an optimizer step reads and writes for a weight: of its gradient for the norm, the scale and the
update, and of weight and moments; 4 bytes each time."""
PASSES = 3
"""Forward, and backward as two passes: times that the kernels of a sub-block are started."""
START_S = 20.0
"""Start of a process with vLLM until it generates."""
OPEN_S = 3.0
"""Opening of another engine in a process that has one."""


@dataclass(frozen=True)
class Computer:
    """What computes a stage.

    Attributes:
        device: one of the devices.
        count: devices that share the work.
    """

    device: Device
    count: int = 1

    def flops(self, dtype: str) -> float:
        """Operations a second that products of large matrices reach."""
        rates = {str(name): rate for name, rate in self.device.flops.items()}
        return self.count * COMPUTED * rates.get(dtype, rates["float32"])

    def computed_dtype(self, dtype: str) -> Dtype:
        """What the device computes in for a model of a precision: float32 where its profile lacks that."""
        return next((known for known in self.device.flops if known == dtype), "float32")

    def computing_s(self, flops: float, dtype: str) -> float:
        """Time of forward and backward passes."""
        return flops / (TRAINED * self.flops(dtype))

    def training_s(self, flops: float, dtype: str, *, steps: int, micro_batches: int, shape: Architecture) -> float:
        """Time of a training.

        Args:
            flops: of all steps.
            dtype: of products of matrices.
            steps: optimizer steps.
            micro_batches: of each rank in a step.
            shape: the model.
        """
        moved = steps * OPTIMIZER_BYTES * shape.parameters / self.count / (STREAMED * self.device.bytes_per_s)
        starts = PASSES * steps * micro_batches * subblocks(shape) * self.device.subblock_s
        return self.computing_s(flops, dtype) + moved + starts

    def generation_s(self, shape: Architecture, load: Measurement, num_requests: int) -> float:
        """Time of so many answers of full length, a batch after the other; each device has a model of its own."""
        request_s = predicted_model(shape, load, self.device).request_ms / 1000
        return request_s * -(-num_requests // (load.batch_size * self.count))


def subblocks(shape: Architecture) -> int:
    """Attentions and FFNs of a model."""
    return sum((b.num_key_value_heads is not None) + (b.intermediate_size is not None) for b in shape.blocks)


def scoring_flops(parent: Architecture, spaces: Sequence[LayerSpace], tokens: int, seq_len: int) -> float:
    """Operations of replace-one-block scores: each variant, and what is behind it in the parent, logits included.

    Args:
        parent: the model.
        spaces: what each layer may have; a layer without alternatives is not scored.
        tokens: of text.
        seq_len: tokens of a row.
    """
    flops = float(forward_flops(parent, tokens, seq_len))
    behind = 2 * parent.vocab_size * parent.hidden_size * tokens
    for block, space in zip(reversed(parent.blocks), reversed(spaces), strict=True):
        for variant in (variant for part in PARTS for variant in space.of(part)[1:]):
            flops += behind + block_flops(parent, block_of_variant(variant), tokens, seq_len)
        behind += block_flops(parent, block, tokens, seq_len)
    return flops


def block_of_variant(variant: Variant) -> BlockConfig:
    """A layer with nothing but a variant."""
    return block_of(variant.size, 0) if variant.part == "attention" else block_of(0, variant.size)
