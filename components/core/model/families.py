"""Checks from `config.json` alone whether the decoder can represent a checkpoint; refuses others with the reason."""

from collections.abc import Mapping
from typing import Any

from components.core.base.errors import CheckpointError

DENSE_FAMILIES = ("llama", "mistral", "qwen2")
HETEROGENEOUS_FAMILY = "nemotron-nas"
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")
EXPERT_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_intermediate_size")
NONSENSE = (TypeError, AttributeError, ValueError, ArithmeticError, LookupError)
"""Errors that reading a configuration raises where its values have the wrong types."""
MISTRAL_WINDOW = 4096
"""Default sliding window of Mistral configurations, tokens."""


def refuse_unknown_family(config: Mapping[str, Any]) -> None:
    """Refuse a model type whose blocks are not those of a Llama.

    Raises:
        CheckpointError: with the reason.
    """
    family = str(config.get("model_type"))
    experts = next((key for key in EXPERT_KEYS if config.get(key)), None)
    if experts or "moe" in family or family == "mixtral":
        reason = "the decoder has no mixtures of experts" + (f" ({experts}={config[experts]})" if experts else "")
    elif family.startswith("qwen3"):
        reason = "the decoder has no norms on queries and keys"
    elif family in (*DENSE_FAMILIES, HETEROGENEOUS_FAMILY):
        return
    else:
        reason = "its blocks are unknown to the decoder"
    raise CheckpointError(
        f"model_type {family!r} is not supported: {reason}",
        hint="start from a Llama, Mistral, Qwen2 or nemotron-nas checkpoint",
    )


def refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose model the decoder would compute differently.

    Raises:
        CheckpointError: with the reason, and the way out where there is one.
    """
    refuse_unknown_family(config)
    _refuse_remote_code(config)
    try:
        _refuse_sliding_window(config)
        _refuse_rope(config)
    except NONSENSE as error:
        raise CheckpointError(f"config.json makes no sense: {error}") from None
    if config.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act={config['hidden_act']!r} is not supported: every FFN is gated by silu")
    if config.get("quantization_config"):
        raise CheckpointError(
            "quantised weights can be neither searched nor trained",
            hint="start from the checkpoint before quantisation",
        )


def _refuse_remote_code(config: Mapping[str, Any]) -> None:
    """Code from a model folder is never run; nemotron-nas folders are read without theirs."""
    modules = config.get("auto_map")
    if modules and config.get("model_type") != HETEROGENEOUS_FAMILY:
        raise CheckpointError(
            f"the checkpoint asks for code of its own (auto_map: {modules}), and code from a model folder is never run",
            hint="if it is a plain Llama, Mistral or Qwen2, remove auto_map from its config.json",
        )


def _refuse_sliding_window(config: Mapping[str, Any]) -> None:
    """Refuse a sliding window that some layer uses and that is shorter than the longest sequence."""
    layers = config.get("num_hidden_layers", 0)
    if config["model_type"] == "mistral":
        window = config.get("sliding_window", MISTRAL_WINDOW)
    elif config.get("use_sliding_window") and config.get("max_window_layers", 0) < layers:
        window = config.get("sliding_window")
    elif "sliding_attention" in (config.get("layer_types") or ()):
        window = config.get("sliding_window")
    else:
        return
    positions = config.get("max_position_embeddings")
    if window is not None and (positions is None or window < positions):
        raise CheckpointError(
            f"sliding-window attention is not supported: sliding_window={window}, max_position_embeddings={positions}",
            hint=f"sequences of up to {window} tokens are the same without it: set sliding_window to null and "
            f"max_position_embeddings to {window} in config.json",
        )


def _refuse_rope(config: Mapping[str, Any]) -> None:
    """Refuse unknown RoPE scaling, and RoPE on a part of the head."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        raise CheckpointError(f"rope_type {kind!r} is not supported", hint=f"known types: {', '.join(ROPE_TYPES)}")
    fraction = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if fraction not in (None, 1.0):
        raise CheckpointError(f"partial_rotary_factor={fraction} is not supported: RoPE has to rotate the whole head")
