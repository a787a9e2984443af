"""The heterogeneous decoder in vLLM.

It adds two things to vLLM's own class: linear replacements of attention or FFN, and a first layer without attention.
"""

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.nemotron_nas import DeciLMDecoderLayer, DeciLMForCausalLM, DeciModel

from components.core.model.decoder import is_linear


class LinearReplacement(nn.Module):
    """One matrix in place of attention or FFN, replicated on every device."""

    def __init__(self, name: str, size: int, prefix: str, quant_config: Any) -> None:
        super().__init__()
        self.name = name
        matrix = ReplicatedLinear(size, size, bias=False, quant_config=quant_config, prefix=f"{prefix}.{name}")
        self.add_module(name, matrix)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the matrix."""
        output: Tensor = self.get_submodule(self.name)(x)[0]
        return output


class ServedLayer(DeciLMDecoderLayer):  # type: ignore[misc]  # vLLM has no type hints
    """A layer whose attention or FFN may be a linear replacement, and which may be the first without attention."""

    def __init__(
        self, config: Any, layer_idx: int, cache_config: Any = None, quant_config: Any = None, prefix: str = ""
    ) -> None:
        super().__init__(config, layer_idx, cache_config, quant_config, prefix)
        size, block = config.hidden_size, config.block_configs[layer_idx]
        self.linear_attention, self.linear_ffn = is_linear(block.attention), is_linear(block.ffn)
        self.has_attention, self.has_ffn = not block.attention.no_op, not block.ffn.no_op
        if self.linear_attention:
            self.self_attn = LinearReplacement("linear_attn", size, f"{prefix}.self_attn", quant_config)
            self.input_layernorm = RMSNorm(size, eps=config.rms_norm_eps)
        if self.linear_ffn:
            self.mlp = LinearReplacement("linear_mlp", size, f"{prefix}.mlp", quant_config)
            self.post_attention_layernorm = RMSNorm(size, eps=config.rms_norm_eps)

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Output of the layer's last sub-block, and the residual stream that it is to be added to."""
        if self.linear_attention:
            hidden, residual = _normed(self.input_layernorm, hidden, residual)
            hidden = self.self_attn(hidden)
        elif self.has_attention:
            hidden, residual = _normed(self.input_layernorm, hidden, residual)
            hidden = self.self_attn(positions=positions, hidden_states=hidden)
        if self.linear_ffn or self.has_ffn:
            hidden, residual = _normed(self.post_attention_layernorm, hidden, residual)
            hidden = self.mlp(hidden)
        return hidden, residual


class ServedDecoder(DeciLMForCausalLM):  # type: ignore[misc]
    """vLLM's class with `ServedLayer`."""

    def _init_model(self, vllm_config: Any, prefix: str = "") -> nn.Module:
        model: nn.Module = DeciModel(vllm_config=vllm_config, prefix=prefix, layer_type=ServedLayer)
        return model


def _normed(norm: nn.Module, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """The residual stream after the norm, and before it; `residual` is None before the first sub-block."""
    if residual is None:
        return norm(hidden), hidden
    normed, stream = norm(hidden, residual)
    return normed, stream
