"""The shape of a checkpoint, read from its configuration alone: blocks, parameter counts, KV cache. Light: no torch."""

import math
from collections.abc import Mapping
from typing import Any, Literal, Self

from components.core.config import Config
from components.core.errors import CheckpointError

Family = Literal["llama", "mistral", "qwen2", "nemotron-nas"]
DENSE_FAMILIES = ("llama", "mistral", "qwen2")
KV_BYTES_PER_VALUE = 2
"""KV cache figures are stated at 16 bits a value."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float8": 1}


class BlockConfig(Config):
    """One decoder layer."""

    num_key_value_heads: int | None
    """Key and value heads; None: no attention."""
    intermediate_size: int | None
    """Width of the feed-forward network; None: no FFN."""


class Architecture(Config):
    """A Llama-shaped decoder."""

    family: Family
    """Model type of the configuration."""
    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    num_attention_heads: int
    """Query heads a layer."""
    head_dim: int
    """Size of a head."""
    blocks: tuple[BlockConfig, ...]
    """Decoder layers, first to last."""
    qkv_bias: bool = False
    """Biases on query, key and value projections."""
    o_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases on the three FFN projections."""
    tie_word_embeddings: bool = False
    """Whether input and output embedding are one matrix."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `config.json` of a supported family.

        Raises:
            CheckpointError: another family, or a key is missing.
        """
        family = config.get("model_type")
        if family not in (*DENSE_FAMILIES, "nemotron-nas"):
            raise CheckpointError(
                f"model_type {family!r} is not supported", hint="Llama, Mistral, Qwen2 and nemotron-nas checkpoints are"
            )
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            biased = bool(config.get("attention_bias", False))
            return cls(
                family=family,
                vocab_size=config["vocab_size"],
                hidden_size=hidden,
                num_attention_heads=heads,
                head_dim=config.get("head_dim") or hidden // heads,
                blocks=_nas_blocks(config) if family == "nemotron-nas" else _dense_blocks(config),
                qkv_bias=config.get("qkv_bias", True if family == "qwen2" else biased),
                o_bias=biased,
                mlp_bias=bool(config.get("mlp_bias", False)),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            )
        except KeyError as error:
            raise CheckpointError(f"config.json lacks {error.args[0]!r}") from None

    @property
    def uniform(self) -> BlockConfig | None:
        """The block that every layer is, with attention and FFN; None where layers differ."""
        first = self.blocks[0]
        same = all(block == first for block in self.blocks)
        return first if same and first.num_key_value_heads and first.intermediate_size else None

    def attention_parameters(self, block: BlockConfig) -> int:
        """Weights and biases of a layer's attention, without its norm."""
        if block.num_key_value_heads is None:
            return 0
        width, narrow = self.num_attention_heads * self.head_dim, block.num_key_value_heads * self.head_dim
        weights = 2 * self.hidden_size * (width + narrow)
        return weights + (width + 2 * narrow) * self.qkv_bias + self.hidden_size * self.o_bias

    def ffn_parameters(self, block: BlockConfig) -> int:
        """Weights and biases of a layer's FFN, without its norm."""
        if block.intermediate_size is None:
            return 0
        weights = 3 * self.hidden_size * block.intermediate_size
        return weights + (2 * block.intermediate_size + self.hidden_size) * self.mlp_bias

    def parameters_by_part(self) -> dict[str, int]:
        """Parameters of embedding, attention, FFN, norms and language-model head; a tied head has none of its own."""
        embedding = self.vocab_size * self.hidden_size
        norms = 1 + sum(
            (block.num_key_value_heads is not None) + (block.intermediate_size is not None) for block in self.blocks
        )
        return {
            "embedding": embedding,
            "attention": sum(self.attention_parameters(block) for block in self.blocks),
            "ffn": sum(self.ffn_parameters(block) for block in self.blocks),
            "norm": norms * self.hidden_size,
            "lm_head": 0 if self.tie_word_embeddings else embedding,
        }

    @property
    def parameters(self) -> int:
        """All parameters."""
        return sum(self.parameters_by_part().values())

    def kv_bytes(self, block: BlockConfig) -> int:
        """Bytes of KV cache a token of one layer."""
        return 2 * (block.num_key_value_heads or 0) * self.head_dim * KV_BYTES_PER_VALUE

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV cache a token of all layers."""
        return sum(self.kv_bytes(block) for block in self.blocks)

    def block_configs(self) -> list[dict[str, Any]]:
        """The layers as `config.json` of type nemotron-nas holds them: `intermediate_size` without `ffn_mult`, any width."""
        return [
            {
                "attention": {
                    "no_op": block.num_key_value_heads is None,
                    "n_heads_in_group": None
                    if block.num_key_value_heads is None
                    else self.num_attention_heads // block.num_key_value_heads,
                },
                "ffn": {"no_op": block.intermediate_size is None, "intermediate_size": block.intermediate_size},
            }
            for block in self.blocks
        ]


def ffn_mult_width(ffn_mult: float, hidden_size: int) -> int:
    """Width that NVIDIA's `ffn_mult` stands for: 2/3 of the multiple, rounded up to a multiple of 256."""
    return 256 * math.ceil(int(2 * ffn_mult * hidden_size / 3) / 256)


def _dense_blocks(config: Mapping[str, Any]) -> tuple[BlockConfig, ...]:
    """Equal layers of a dense checkpoint."""
    heads = config.get("num_key_value_heads") or config["num_attention_heads"]
    block = BlockConfig(num_key_value_heads=heads, intermediate_size=config["intermediate_size"])
    return (block,) * int(config["num_hidden_layers"])


def _nas_blocks(config: Mapping[str, Any]) -> tuple[BlockConfig, ...]:
    """Layers of a nemotron-nas configuration, ours or NVIDIA's."""
    blocks = []
    for number, block in enumerate(config["block_configs"]):
        attention, ffn = block["attention"], block["ffn"]
        if attention.get("replace_with_linear") or ffn.get("replace_with_linear"):
            raise CheckpointError(f"layer {number} has a linear block", hint="vLLM does not run linear blocks")
        width = ffn.get("intermediate_size")
        if width is None and not ffn["no_op"]:
            width = ffn_mult_width(ffn["ffn_mult"], config["hidden_size"])
        heads = None if attention["no_op"] else config["num_attention_heads"] // attention["n_heads_in_group"]
        blocks.append(BlockConfig(num_key_value_heads=heads, intermediate_size=None if ffn["no_op"] else width))
    if len(blocks) != config["num_hidden_layers"]:
        raise CheckpointError(f"{len(blocks)} block_configs for num_hidden_layers={config['num_hidden_layers']}")
    return tuple(blocks)
