"""The configurations of two released nemotron-nas models, rebuilt from runs of equal layers."""

from typing import Any

Run = tuple[int, int | None, float | None]
"""Number of layers, their KV heads (None: no attention), their ffn_mult (None: no FFN)."""

SUPER_49B: tuple[Run, ...] = (
    (1, 8, 2.625), (5, 8, 5.25), (2, None, 2.625), (3, 8, 5.25), (1, None, 3.28125), (30, 8, 5.25), (1, None, 1.3125),
    (2, None, 2.625), (1, None, 1.3125), (1, None, 5.25), (1, None, 1.3125), (1, None, 2.625), (3, None, 1.3125),
    (1, 8, 5.25), (1, None, 1.3125), (2, None, 1.0), (1, None, 1.3125), (3, None, 1.0), (2, None, 1.3125),
    (2, None, 0.5), (2, None, 1.0), (2, None, 0.5), (1, None, 1.0), (2, None, 0.5), (9, 8, 5.25),
)  # fmt: skip
ULTRA_253B: tuple[Run, ...] = (
    (1, 8, 0.4875), (1, 8, 0.975), (6, 8, 1.4625), (1, 8, 1.95), (4, None, None), (3, 8, 1.95), (2, 8, 4.875),
    (6, None, None), (3, 8, 4.875), (5, None, None), (3, 8, 4.875), (1, 8, 2.4375), (3, None, None), (3, 8, 1.95),
    (1, None, 1.95), (1, 8, 4.875), (1, None, 4.875), (5, None, None), (4, 8, 4.875), (5, None, None), (4, 8, 4.875),
    (5, None, None), (4, 8, 4.875), (5, None, None), (4, 8, 4.875), (5, None, None), (1, 8, 4.875), (3, 8, 3.4125),
    (2, None, None), (1, 8, 2.925), (3, 8, 2.4375), (2, None, 2.4375), (1, 8, 2.4375), (1, None, None),
    (7, None, 2.4375), (1, 8, 2.4375), (5, None, None), (1, 8, 2.925), (1, 8, 4.875), (1, None, 4.875), (1, 8, 4.875),
    (8, None, None), (1, None, 36.5625), (8, None, None), (1, None, 39.0), (8, None, None), (1, None, 31.40625),
    (5, None, None), (1, None, 27.5625), (1, None, 1.95), (1, 8, 1.95), (1, 8, 2.4375), (1, None, None),
    (2, 8, 2.4375), (1, 8, 3.4125), (4, 8, 4.875), (1, 8, 2.4375),
)  # fmt: skip


def nvidia_config(runs: tuple[Run, ...], hidden_size: int, num_attention_heads: int, factor: float) -> dict[str, Any]:
    """A `config.json` as NVIDIA writes it: `ffn_mult`, `n_heads_in_group`, `rope_scaling`, an `auto_map`."""
    blocks = [_block(heads, mult, num_attention_heads) for count, heads, mult in runs for _ in range(count)]
    rope = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {
        "architectures": ["DeciLMForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "model_type": "nemotron-nas",
        "block_configs": blocks,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": None,
        "intermediate_size": None,
        "num_hidden_layers": len(blocks),
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": factor, **rope},
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "eos_token_id": [128001, 128008, 128009],
        "torch_dtype": "bfloat16",
    }


def super_49b() -> dict[str, Any]:
    """Llama-3.3-Nemotron-Super-49B-v1."""
    return nvidia_config(SUPER_49B, 8192, 64, 8.0)


def ultra_253b() -> dict[str, Any]:
    """Llama-3.1-Nemotron-Ultra-253B-v1."""
    return nvidia_config(ULTRA_253B, 16384, 128, 16.0)


def _block(num_key_value_heads: int | None, ffn_mult: float | None, num_attention_heads: int) -> dict[str, Any]:
    group = None if num_key_value_heads is None else num_attention_heads // num_key_value_heads
    attention = {"no_op": group is None, "replace_with_linear": False, "n_heads_in_group": group, "window_length": None}
    ffn = {"no_op": ffn_mult is None, "replace_with_linear": False, "ffn_mult": ffn_mult, "sparsify": None}
    return {"attention": attention, "ffn": ffn}
