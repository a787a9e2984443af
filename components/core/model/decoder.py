"""The decoder: a Llama in which each layer has its own number of KV heads and FFN width, or no attention or FFN.

Shape letters: B sequences, T tokens, D hidden size, H query heads, K key and value heads, E head size, V vocabulary.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from components.core.model.attention import Mask, attend, packed_mask
from components.core.model.layers import Embedding, Linear, RMSNorm, RotaryEmbedding, rotate

InputT = TypeVar("InputT")
OutputT = TypeVar("OutputT")


def _attribute_access(value: Any) -> Any:
    """Convert nested dictionaries to objects with attributes, as vLLM reads block configurations."""
    if isinstance(value, dict):
        return SimpleNamespace(**{key: _attribute_access(item) for key, item in value.items()})
    return value


def _plain(value: Any) -> Any:
    """The inverse of `_attribute_access`."""
    if isinstance(value, SimpleNamespace):
        return {key: _plain(item) for key, item in vars(value).items()}
    return value


class TesseraConfig(PretrainedConfig):
    """Configuration of model type `nemotron-nas`: Llama's, with a block configuration for each layer.

    Attributes:
        block_configs: for each layer, `attention` {no_op, n_heads_in_group, replace_with_linear} and `ffn` {no_op,
            intermediate_size, replace_with_linear}; `replace_with_linear` may be absent.
        qkv_bias: biases on the query, key and value projections (Qwen2).
        attention_bias: bias on the attention's output projection, and on the other three if `qkv_bias` is absent.
        mlp_bias: biases on the three FFN projections.
        rope_parameters: type, base and scaling of the rotary positions; `rope_theta` and `rope_scaling` are read too.
        source_family: dense family of the first parent: llama, mistral or qwen2.
        parent_layers: for each layer, the number of parent layers whose work its output contains.
    """

    model_type = "nemotron-nas"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        head_dim: int | None = None,
        block_configs: list[Any] | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-5,
        max_position_embeddings: int = 2048,
        rope_parameters: dict[str, Any] | None = None,
        initializer_range: float = 0.02,
        attention_bias: bool = False,
        qkv_bias: bool | None = None,
        mlp_bias: bool = False,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.block_configs = [_attribute_access(block) for block in block_configs or []]
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.max_position_embeddings = max_position_embeddings
        self.rope_parameters = dict(rope_parameters or {})
        self.initializer_range = initializer_range
        self.attention_bias = attention_bias
        self.qkv_bias = attention_bias if qkv_bias is None else qkv_bias
        self.mlp_bias = mlp_bias
        super().__init__(**{"tie_word_embeddings": tie_word_embeddings, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        values: dict[str, Any] = super().to_dict()
        values["block_configs"] = [_plain(block) for block in self.block_configs]
        return values

    def num_key_value_heads_of(self, layer: int) -> int:
        """Key and value heads of a layer; 0 if it has no attention, or a linear one."""
        attention = self.block_configs[layer].attention
        return 0 if attention.no_op or is_linear(attention) else self.num_attention_heads // attention.n_heads_in_group


def is_linear(part: Any) -> bool:
    """Whether the attention or FFN of a block configuration is one matrix."""
    return bool(getattr(part, "replace_with_linear", False))


class Attention(nn.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, config: TesseraConfig, layer: int) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        # Layers without attention have no entry in the cache: Hugging Face counts the cached tokens in its first entry.
        self.cache_index = sum(config.num_key_value_heads_of(other) > 0 for other in range(layer))
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads_of(layer)
        width, narrow = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        self.q_proj = Linear(size, width, bias=config.qkv_bias)
        self.k_proj = Linear(size, narrow, bias=config.qkv_bias)
        self.v_proj = Linear(size, narrow, bias=config.qkv_bias)
        self.o_proj = Linear(width, size, bias=config.attention_bias)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: DynamicCache | None) -> Tensor:
        """Attend within the mask, causally if there is none; cached keys and values precede those of `x`."""
        B, T, _ = x_BTD.shape
        q_BHTE = self.q_proj(x_BTD).view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
        k_BKTE = self.k_proj(x_BTD).view(B, T, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        v_BKTE = self.v_proj(x_BTD).view(B, T, self.num_key_value_heads, self.head_dim).transpose(1, 2)
        q_BHTE, k_BKTE = rotate(q_BHTE, rotary), rotate(k_BKTE, rotary)
        if cache is not None:
            k_BKTE, v_BKTE = cache.update(k_BKTE, v_BKTE, self.cache_index)
        mixed_BHTE = attend(q_BHTE, k_BKTE, v_BKTE, mask)
        output: Tensor = self.o_proj(mixed_BHTE.transpose(1, 2).reshape(B, T, -1))
        return output


class Mlp(nn.Module):
    """SwiGLU feed-forward network; a fused one differs only in its width."""

    def __init__(self, config: TesseraConfig, layer: int) -> None:
        super().__init__()
        size, width = config.hidden_size, config.block_configs[layer].ffn.intermediate_size
        self.gate_proj = Linear(size, width, bias=config.mlp_bias)
        self.up_proj = Linear(size, width, bias=config.mlp_bias)
        self.down_proj = Linear(width, size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """down(silu(gate(x)) * up(x))."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class LinearAttention(nn.Module):
    """One matrix in place of an attention: no token attends to another."""

    def __init__(self, config: TesseraConfig) -> None:
        super().__init__()
        self.linear_attn = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """The product with the matrix; the other arguments of an attention are ignored."""
        output: Tensor = self.linear_attn(x)
        return output


class LinearMlp(nn.Module):
    """One matrix in place of an FFN."""

    def __init__(self, config: TesseraConfig) -> None:
        super().__init__()
        self.linear_mlp = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The product with the matrix."""
        output: Tensor = self.linear_mlp(x)
        return output


class DecoderLayer(nn.Module):
    """Attention, then FFN, each after its norm and added to the residual stream; either may be absent with its norm."""

    def __init__(self, config: TesseraConfig, layer: int) -> None:
        super().__init__()
        block = config.block_configs[layer]
        norm = (config.hidden_size, config.rms_norm_eps)
        self.self_attn = None if block.attention.no_op else _attention(config, layer)
        self.input_layernorm = None if block.attention.no_op else RMSNorm(*norm)
        self.mlp = None if block.ffn.no_op else _mlp(config, layer)
        self.post_attention_layernorm = None if block.ffn.no_op else RMSNorm(*norm)

    def forward(self, x_BTD: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: DynamicCache | None) -> Tensor:
        """The residual stream after this layer."""
        if self.self_attn is not None and self.input_layernorm is not None:
            x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotary, mask, cache)
        if self.mlp is not None and self.post_attention_layernorm is not None:
            x_BTD = x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))
        return x_BTD


def _attention(config: TesseraConfig, layer: int) -> nn.Module:
    linear = is_linear(config.block_configs[layer].attention)
    return LinearAttention(config) if linear else Attention(config, layer)


def _mlp(config: TesseraConfig, layer: int) -> nn.Module:
    linear = is_linear(config.block_configs[layer].ffn)
    return LinearMlp(config) if linear else Mlp(config, layer)


class TesseraModel(nn.Module):
    """Embedding, decoder layers, final norm."""

    layers: Any
    """A `ModuleList` of `DecoderLayer`; torch's types know no attribute of its items."""

    def __init__(self, config: TesseraConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        self.activation_checkpointing = False
        draw_weights(self, config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states after the final norm.

        Args:
            input_ids: (B, T).
            position_ids: (B, T) or (1, T); None: they restart with each segment, or continue after the cache.
            segment_ids: (B, T), the number of the document of each token in a packed row; attention stays within a
                document. The tokens of a document are contiguous. Not for use with a cache.
            attention_mask: (B, S), 0 for padding, over cache and input together.
            past_key_values: cached keys and values of the tokens before.
            use_cache: return a cache.
            output_hidden_states: also return the output of the embedding and of each layer, the last after the norm.
        """
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if position_ids is None:
            position_ids = _positions(input_ids, segment_ids, past)
        mask = _mask(input_ids, segment_ids, attention_mask, past, self.config.head_dim)
        x_BTD = self.embed_tokens(input_ids)
        rotary = self.rotary_emb(x_BTD, position_ids)
        states = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(x_BTD)
            if self.activation_checkpointing and self.training:
                x_BTD = checkpoint(layer, x_BTD, rotary, mask, None, use_reentrant=False)
            else:
                x_BTD = layer(x_BTD, rotary, mask, past_key_values)
        x_BTD = self.norm(x_BTD)
        return BaseModelOutputWithPast(
            last_hidden_state=x_BTD,
            past_key_values=past_key_values,
            hidden_states=(*states, x_BTD) if output_hidden_states else None,
        )


class TesseraForCausalLM(nn.Module):
    """The decoder with its language-model head.

    It is a plain module, since every process would load much else with Hugging Face's base class (decision 0050).
    """

    def __init__(self, config: TesseraConfig) -> None:
        super().__init__()
        self.config = config
        self.model = TesseraModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        draw_weights(self.lm_head, config.initializer_range)
        self.tie_weights()

    @property
    def device(self) -> torch.device:
        """Where the embedding is."""
        return self.model.embed_tokens.weight.device

    def tie_weights(self) -> None:
        """Let the head be the embedding, where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def num_parameters(self) -> int:
        """Number of weights; those of a tied head count once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def forward_with(self, function: Callable[[Self, InputT], OutputT], inputs: InputT) -> OutputT:
        """`function(self, inputs)` as a forward pass, for which the weights of a sharded model are gathered."""
        return function(self, inputs)

    def forward(
        self, input_ids: Tensor, *, labels: Tensor | None = None, logits_to_keep: int = 0, **inputs: Any
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and with `labels` the mean next-token loss; see `TesseraModel.forward` for the inputs."""
        output = self.model(input_ids, **inputs)
        logits_BTV = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BTV[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,  # type: ignore[arg-type]  # Hugging Face's hint names another tensor type
            logits=logits_BTV,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
        )


def draw_weights(module: nn.Module, deviation: float) -> None:
    """Draw the matrices within a module from a normal distribution; biases are 0, as in Hugging Face's Llama."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=deviation)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


def _positions(input_ids_BT: Tensor, segment_ids_BT: Tensor | None, past: int) -> Tensor:
    """Position of each token in its document, (1, T) or (B, T)."""
    positions_1T = torch.arange(past, past + input_ids_BT.shape[1], device=input_ids_BT.device)[None]
    if segment_ids_BT is None:
        return positions_1T
    begins_BT = segment_ids_BT.diff(dim=1, prepend=segment_ids_BT[:, :1] - 1) != 0
    return positions_1T - (positions_1T * begins_BT).cummax(dim=1).values


def _mask(
    input_ids_BT: Tensor, segment_ids_BT: Tensor | None, attention_mask_BS: Tensor | None, past: int, head_dim: int
) -> Mask:
    """Which keys each query attends to; None for causal attention without a cache."""
    T = input_ids_BT.shape[1]
    if segment_ids_BT is not None:
        return packed_mask(segment_ids_BT, head_dim)
    if attention_mask_BS is not None and bool((attention_mask_BS == 0).any()):
        causal_TS = torch.ones(T, past + T, dtype=torch.bool, device=input_ids_BT.device).tril(past)
        allowed_BTS = causal_TS[None] & attention_mask_BS[:, None, :].bool()
        itself_TS = torch.eye(T, past + T, dtype=torch.bool, device=input_ids_BT.device).roll(past, 1)
        return (allowed_BTS | itself_TS)[:, None]
    if past and T > 1:
        return torch.ones(T, past + T, dtype=torch.bool, device=input_ids_BT.device).tril(past)[None, None]
    return None
