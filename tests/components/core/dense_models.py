"""Random dense models of the supported families, as plain transformers makes them."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from components.core.model.checkpoint import model_config
from components.core.model.decoder import TesseraForCausalLM

VOCAB_SIZE = 61
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
CLASSES: Mapping[str, tuple[Any, Any]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
VARIETIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, all biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, head size of its own": ("llama", {"head_dim": 20}),
    "mistral": ("mistral", {}),
    "mistral, head size of its own": ("mistral", {"head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
}
"""By name: the family, and what differs from its defaults."""
LONG = {"original_max_position_embeddings": 16}
ROPES: Mapping[str, Mapping[str, Any]] = {
    "default": {"rope_theta": 5000.0},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, **LONG},
    "longrope": {"factor": 4.0, "short_factor": [1.0] * 6, "long_factor": [1.5] * 6, **LONG},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **LONG},
}
"""Rotary scalings for heads of size 12."""


def dense_model(family: str, **changes: Any) -> PreTrainedModel:
    """A random model whose biases and norms differ from nought and one."""
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config_class(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.train(False)
    return model


def variety(name: str) -> PreTrainedModel:
    """One of `VARIETIES`."""
    family, changes = VARIETIES[name]
    return dense_model(family, **changes)


def rope_model(kind: str, **changes: Any) -> PreTrainedModel:
    """A Llama with one of `ROPES`."""
    return dense_model("llama", rope_parameters={"rope_type": kind, "rope_theta": 1000.0, **ROPES[kind]}, **changes)


def twin(dense: PreTrainedModel) -> TesseraForCausalLM:
    """Our decoder with the same weights."""
    model = TesseraForCausalLM(model_config(dense.config.to_dict()))
    model.load_state_dict(dense.state_dict())
    model.tie_weights()
    model.train(False)
    return model
