"""The architecture of a checkpoint, from its configuration alone: blocks, parameters, KV cache. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from components.core.base.config import Config
from components.core.base.errors import CheckpointError
from components.core.model.families import HETEROGENEOUS_FAMILY, NONSENSE, refuse_unknown_family
from components.core.model.layer_numbering import LAYERS, SKIPS_LAYERS

Family = Literal["llama", "mistral", "qwen2", "nemotron-nas"]
KV_BYTES_PER_VALUE = 2
"""KV cache figures are stated at 16 bits a value."""
UNSUPPORTED_KEYS = {"attention": ("window_length", "num_sink_tokens", "mamba"), "ffn": ("moe",)}
"""Keys of NVIDIA's block configurations for kinds of blocks that the decoder does not have."""
WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
MASK_BLOCK = 128
"""Queries, and keys, of a block of the mask of packed rows on a GPU."""
MIN_BLOCK_HEAD = 16
"""Smallest head that FlexAttention computes on a GPU."""


MAX_LAYERS, MAX_SIZE = 10_000, 1 << 32
"""Upper limits, above those of any model: a configuration is untrusted input."""

Linear = Literal["linear"]
"""An attention or FFN that is one square matrix without bias, after its norm."""
LINEAR: Linear = "linear"
Count = Annotated[int, Field(ge=1, le=MAX_SIZE)]


class BlockConfig(Config):
    """One decoder layer."""

    num_key_value_heads: Count | Linear | None
    """Key and value heads; `linear`: one matrix instead; None: no attention."""
    intermediate_size: Count | Linear | None
    """Width of the feed-forward network; `linear`: one matrix instead; None: no FFN."""

    @property
    def is_empty(self) -> bool:
        """Whether it passes its input on."""
        return self.num_key_value_heads is None and self.intermediate_size is None

    @property
    def attends(self) -> bool:
        """Whether the layer has attention with a KV cache."""
        return isinstance(self.num_key_value_heads, int)


class Architecture(Config):
    """A Llama-shaped decoder."""

    family: Family
    """Model type of the configuration."""
    vocab_size: int = Field(ge=1, le=MAX_SIZE)
    """Rows of the embedding."""
    hidden_size: int = Field(ge=1, le=MAX_SIZE)
    """Width of the residual stream."""
    num_attention_heads: int = Field(ge=1, le=MAX_SIZE)
    """Query heads a layer."""
    head_dim: int = Field(ge=1, le=MAX_SIZE)
    """Size of a head."""
    blocks: tuple[BlockConfig, ...] = Field(min_length=1, max_length=MAX_LAYERS)
    """Decoder layers, first to last."""
    qkv_bias: bool = False
    """Biases on query, key and value projections."""
    o_bias: bool = False
    """Bias on the attention's output projection."""
    mlp_bias: bool = False
    """Biases on the three FFN projections."""
    tie_word_embeddings: bool = False
    """Whether input and output embedding are one matrix."""
    numbers: tuple[int, ...] | None = None
    """Number of each layer in the names of its weights; None: 0, 1, 2, …."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        for number, block in enumerate(self.blocks):
            heads, kv_heads = self.num_attention_heads, block.num_key_value_heads
            if isinstance(kv_heads, int) and heads % kv_heads:
                raise ValueError(f"layer {number}: {heads} heads do not divide by {kv_heads} KV heads")
        return self

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a `config.json` of a supported family.

        Raises:
            CheckpointError: the family is not supported, or a key is missing or has an impossible value.
        """
        refuse_unknown_family(config)
        family = config["model_type"]
        try:
            heads, hidden = config["num_attention_heads"], config["hidden_size"]
            biased = bool(config.get("attention_bias", False))
            blocks = _nas_blocks(config) if family == HETEROGENEOUS_FAMILY else _dense_blocks(config)
            numbers = [number for number, block in enumerate(blocks) if not block.is_empty]
            skips = config.get(SKIPS_LAYERS, False) is True
            return cls(
                family=family,
                vocab_size=config["vocab_size"],
                hidden_size=hidden,
                num_attention_heads=heads,
                head_dim=config.get("head_dim") or hidden // heads,
                blocks=tuple(blocks[number] for number in numbers) if skips else blocks,
                qkv_bias=bool(config.get("qkv_bias", family == "qwen2" or biased)),
                o_bias=biased,
                mlp_bias=bool(config.get("mlp_bias", False)),
                tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
                numbers=tuple(numbers) if skips else None,
            )
        except KeyError as error:
            raise CheckpointError(f"config.json lacks {error.args[0]!r}") from None
        except ValidationError as error:
            faults = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
            raise CheckpointError(f"config.json makes no sense: {faults}") from None
        except NONSENSE as error:
            raise CheckpointError(f"config.json makes no sense: {error}") from None

    @property
    def uniform(self) -> BlockConfig | None:
        """The block of all layers, if they are equal and have attention and FFN, neither of them linear; else None."""
        first = self.blocks[0]
        same = all(block == first for block in self.blocks)
        whole = first.attends and isinstance(first.intermediate_size, int)
        return first if same and whole else None

    def needs_plugin(self) -> str | None:
        """The reason why vLLM needs our plug-in for this model; None if it does not."""
        for number, block in zip(self.layer_numbers, self.blocks, strict=True):
            if LINEAR in (block.num_key_value_heads, block.intermediate_size):
                return f"layer {number} has a linear part"
        begins = self.blocks[0].attends and self.layer_numbers[0] == 0
        return None if begins else "the first layer has no attention"

    @property
    def layer_numbers(self) -> Sequence[int]:
        """Number of each layer in the names of its weights."""
        return range(len(self.blocks)) if self.numbers is None else self.numbers

    def without_gaps(self) -> Self:
        """The same architecture with layers numbered 0, 1, 2, …, for comparing models."""
        return self.model_copy(update={"numbers": None})

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by its Hugging Face name; a tied head has no entry."""
        size = self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, size)}
        for number, block in zip(self.layer_numbers, self.blocks, strict=True):
            prefix = f"{LAYERS}{number}."
            shapes |= {prefix + name: shape for name, shape in self._attention_shapes(block).items()}
            shapes |= {prefix + name: shape for name, shape in self._ffn_shapes(block).items()}
        shapes["model.norm.weight"] = (size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, size)
        return shapes

    def _attention_shapes(self, block: BlockConfig) -> dict[str, tuple[int, ...]]:
        if block.num_key_value_heads is None:
            return {}
        norm = {"input_layernorm.weight": (self.hidden_size,)}
        if block.num_key_value_heads == LINEAR:
            return {**norm, "self_attn.linear_attn.weight": (self.hidden_size, self.hidden_size)}
        width, narrow = self.num_attention_heads * self.head_dim, block.num_key_value_heads * self.head_dim
        rows = {"q_proj": width, "k_proj": narrow, "v_proj": narrow}
        shapes: dict[str, tuple[int, ...]] = {**norm}
        shapes |= {f"self_attn.{name}.weight": (size, self.hidden_size) for name, size in rows.items()}
        shapes["self_attn.o_proj.weight"] = (self.hidden_size, width)
        if self.qkv_bias:
            shapes |= {f"self_attn.{name}.bias": (size,) for name, size in rows.items()}
        if self.o_bias:
            shapes["self_attn.o_proj.bias"] = (self.hidden_size,)
        return shapes

    def _ffn_shapes(self, block: BlockConfig) -> dict[str, tuple[int, ...]]:
        if block.intermediate_size is None:
            return {}
        size, width = self.hidden_size, block.intermediate_size
        if width == LINEAR:
            return {"post_attention_layernorm.weight": (size,), "mlp.linear_mlp.weight": (size, size)}
        shapes: dict[str, tuple[int, ...]] = {"post_attention_layernorm.weight": (size,)}
        for name, rows, columns in (("gate_proj", width, size), ("up_proj", width, size), ("down_proj", size, width)):
            shapes[f"mlp.{name}.weight"] = (rows, columns)
            if self.mlp_bias:
                shapes[f"mlp.{name}.bias"] = (rows,)
        return shapes

    def attention_parameters(self, block: BlockConfig) -> int:
        """Weights and biases of a layer's attention, without its norm."""
        if block.num_key_value_heads is None:
            return 0
        if block.num_key_value_heads == LINEAR:
            return self.hidden_size**2
        width, narrow = self.num_attention_heads * self.head_dim, block.num_key_value_heads * self.head_dim
        weights = 2 * self.hidden_size * (width + narrow)
        return weights + (width + 2 * narrow) * self.qkv_bias + self.hidden_size * self.o_bias

    def ffn_parameters(self, block: BlockConfig) -> int:
        """Weights and biases of a layer's FFN, without its norm."""
        if block.intermediate_size is None:
            return 0
        if block.intermediate_size == LINEAR:
            return self.hidden_size**2
        weights = 3 * self.hidden_size * block.intermediate_size
        return weights + (2 * block.intermediate_size + self.hidden_size) * self.mlp_bias

    def parameters_by_part(self) -> dict[str, int]:
        """Parameters of embedding, attention, FFN, norms and language-model head; a tied head counts as 0."""
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
        """KV cache of one layer, bytes per token."""
        heads = block.num_key_value_heads if isinstance(block.num_key_value_heads, int) else 0
        return 2 * heads * self.head_dim * KV_BYTES_PER_VALUE

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache of all layers, bytes per token."""
        return sum(self.kv_bytes(block) for block in self.blocks)

    def block_configs(self) -> list[dict[str, Any]]:
        """The `block_configs` of a nemotron-nas `config.json`; widths are written exactly, without `ffn_mult`."""
        return [{"attention": self._attention_config(block), "ffn": _ffn_config(block)} for block in self.blocks]

    def _attention_config(self, block: BlockConfig) -> dict[str, Any]:
        heads = block.num_key_value_heads
        group = self.num_attention_heads // heads if isinstance(heads, int) else None
        return {"no_op": heads is None, "n_heads_in_group": group, **_linear_key(heads)}


def _ffn_config(block: BlockConfig) -> dict[str, Any]:
    width = block.intermediate_size
    return {"no_op": width is None, "intermediate_size": None if width == LINEAR else width, **_linear_key(width)}


def _linear_key(size: int | Linear | None) -> dict[str, bool]:
    """NVIDIA's key for a linear part; other parts do not have it."""
    return {"replace_with_linear": True} if size == LINEAR else {}


def masks_by_blocks(seq_len: int, head_dim: int, *, on_gpu: bool) -> bool:
    """Whether the attention over packed rows has a mask of blocks, and not one of all pairs of a row.

    Args:
        seq_len: tokens of a row; in one shorter than a block there is nothing to leave out.
        head_dim: size of a head.
        on_gpu: where it is computed; on a CPU FlexAttention has no backward pass.
    """
    return on_gpu and seq_len >= MASK_BLOCK and head_dim >= MIN_BLOCK_HEAD


def ffn_mult_width(ffn_mult: float, hidden_size: int) -> int:
    """FFN width for NVIDIA's `ffn_mult`: 2/3 of the multiple, rounded up to a multiple of 256."""
    return 256 * math.ceil(int(2 * ffn_mult * hidden_size / 3) / 256)


def _dense_blocks(config: Mapping[str, Any]) -> tuple[BlockConfig, ...]:
    """The layers of a dense checkpoint, which are all equal."""
    heads = _number(config.get("num_key_value_heads")) or config["num_attention_heads"]
    block = BlockConfig(num_key_value_heads=heads, intermediate_size=_number(config["intermediate_size"]))
    return (block,) * min(int(config["num_hidden_layers"]), MAX_LAYERS + 1)


def _nas_blocks(config: Mapping[str, Any]) -> tuple[BlockConfig, ...]:
    """Layers of a nemotron-nas configuration, ours or NVIDIA's."""
    blocks = tuple(_nas_block(number, block, config) for number, block in enumerate(config["block_configs"]))
    if len(blocks) != config["num_hidden_layers"]:
        raise CheckpointError(f"{len(blocks)} block_configs for num_hidden_layers={config['num_hidden_layers']}")
    return blocks


def _nas_block(number: int, block: Mapping[str, Any], config: Mapping[str, Any]) -> BlockConfig:
    """One layer of a nemotron-nas configuration."""
    attention, ffn = block["attention"], block["ffn"]
    unknown = [f"{part}.{key}" for part, keys in UNSUPPORTED_KEYS.items() for key in keys if block[part].get(key)]
    unknown += ["parallel_blocks"] * bool(block.get("parallel_blocks"))
    unknown += ["ffn.hidden_act"] * (ffn.get("hidden_act") not in (None, "silu"))
    if unknown:
        raise CheckpointError(f"layer {number} has {', '.join(unknown)}, which the decoder does not support")
    return BlockConfig(
        num_key_value_heads=_nas_heads(number, attention, config), intermediate_size=_nas_width(ffn, config)
    )


def _nas_heads(number: int, attention: Mapping[str, Any], config: Mapping[str, Any]) -> int | Linear | None:
    """KV heads of one layer."""
    kind = _without_size(attention)
    if kind is not None:
        return None if kind == "no_op" else kind
    heads, rest = divmod(config["num_attention_heads"], attention["n_heads_in_group"])
    if rest:
        group = attention["n_heads_in_group"]
        raise CheckpointError(f"layer {number}: {config['num_attention_heads']} heads in groups of {group}")
    return int(heads)


def _nas_width(ffn: Mapping[str, Any], config: Mapping[str, Any]) -> int | Linear | None:
    """FFN width of one layer, from `intermediate_size` or else from `ffn_mult`."""
    kind = _without_size(ffn)
    if kind is not None:
        return None if kind == "no_op" else kind
    return _number(ffn.get("intermediate_size")) or ffn_mult_width(ffn["ffn_mult"], config["hidden_size"])


def _without_size(part: Mapping[str, Any]) -> Literal["no_op", "linear"] | None:
    """The kind of a part that has no size: absent or one matrix; None for an ordinary part."""
    if part.get("no_op") and part.get("replace_with_linear"):
        raise ValueError("a part of a layer has both no_op and replace_with_linear")
    return "no_op" if part.get("no_op") else LINEAR if part.get("replace_with_linear") else None


def _number(value: Any) -> Any:
    """A size from a configuration; the name of a kind of block is no size."""
    if value == LINEAR:
        raise ValueError(f"{value!r} is no size")
    return value
