from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.core.base.errors import CheckpointError
from components.core.model.architecture import LINEAR, Architecture, BlockConfig, ffn_mult_width
from components.core.model.checkpoint import model_config
from components.core.model.decoder import TesseraForCausalLM
from tests.components.core.dense_models import VARIETIES, variety
from tests.components.core.nvidia_configs import super_49b, ultra_253b

BLOCKS = st.builds(
    BlockConfig,
    num_key_value_heads=st.sampled_from([None, LINEAR, 1, 2, 4]),
    intermediate_size=st.one_of(st.sampled_from([None, LINEAR]), st.integers(1, 50)),
)
ARCHITECTURES = st.builds(
    Architecture,
    family=st.just("nemotron-nas"),
    vocab_size=st.integers(1, 40),
    hidden_size=st.just(16),
    num_attention_heads=st.just(4),
    head_dim=st.sampled_from([2, 4, 8]),
    blocks=st.lists(BLOCKS, min_size=1, max_size=4).map(tuple),
    qkv_bias=st.booleans(),
    o_bias=st.booleans(),
    mlp_bias=st.booleans(),
    tie_word_embeddings=st.booleans(),
)


def as_config(shape: Architecture) -> dict[str, Any]:
    values = shape.model_dump(exclude={"family", "blocks", "o_bias"})
    blocks = {"block_configs": shape.block_configs(), "num_hidden_layers": len(shape.blocks)}
    return {"model_type": "nemotron-nas", "attention_bias": shape.o_bias, **blocks, **values}


def test_super_49b_has_the_parameters_and_the_cache_of_the_released_model() -> None:
    shape = Architecture.from_config(super_49b())
    assert shape.parameters == 49_867_145_216
    assert shape.parameters_by_part() == {
        "embedding": 128256 * 8192,
        "attention": 7_398_752_256,
        "ffn": 40_365_981_696,
        "norm": (80 + 49 + 1) * 8192,
        "lm_head": 128256 * 8192,
    }
    assert shape.kv_bytes_per_token == 200_704


def test_ultra_253b_has_the_parameters_and_the_cache_of_the_released_model() -> None:
    shape = Architecture.from_config(ultra_253b())
    assert shape.parameters == 253_401_268_224
    assert shape.kv_bytes_per_token == 262_144
    assert sum(block.num_key_value_heads is None for block in shape.blocks) == 98
    assert sum(block.intermediate_size is None for block in shape.blocks) == 81


@pytest.mark.parametrize(
    ("ffn_mult", "hidden_size", "width"),
    [(5.25, 8192, 28672), (1.3125, 8192, 7168), (0.5, 8192, 2816), (2.925, 16384, 32000), (39.0, 16384, 425984)],
)
def test_ffn_mult_is_two_thirds_rounded_up_to_256(ffn_mult: float, hidden_size: int, width: int) -> None:
    assert ffn_mult_width(ffn_mult, hidden_size) == width


@pytest.mark.parametrize("name", VARIETIES)
def test_names_shapes_and_counts_are_those_of_the_transformers_model(name: str) -> None:
    model = variety(name)
    shape = Architecture.from_config(model.config.to_dict())
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.weight_shapes() == {name: tuple(value.shape) for name, value in model.named_parameters()}


@given(shape=ARCHITECTURES)
@settings(max_examples=40)
def test_any_architecture_survives_its_configuration_and_fits_the_decoder(shape: Architecture) -> None:
    config = as_config(shape)
    assert Architecture.from_config(config) == shape
    with torch.device("meta"):
        model = TesseraForCausalLM(model_config(config))
    if shape.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    weights = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert shape.weight_shapes() == weights
    assert shape.parameters == sum(value.numel() for value in model.parameters())


def test_only_equal_full_layers_are_uniform() -> None:
    full, narrow = (BlockConfig(num_key_value_heads=heads, intermediate_size=8) for heads in (4, 2))
    empty = BlockConfig(num_key_value_heads=None, intermediate_size=8)
    base = Architecture.from_config(super_49b())
    matrix = BlockConfig(num_key_value_heads=4, intermediate_size=LINEAR)
    for blocks, uniform in (((full, full), full), ((full, narrow), None), ((empty, empty), None), ((matrix,), None)):
        assert base.model_copy(update={"blocks": blocks}).uniform == uniform


def block(attention: Mapping[str, Any], ffn: Mapping[str, Any]) -> list[dict[str, Any]]:
    full = {"no_op": False, "n_heads_in_group": 1}, {"no_op": False, "intermediate_size": 8}
    return [{"attention": {**full[0], **attention}, "ffn": {**full[1], **ffn}}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_configs": block({"replace_with_linear": True, "no_op": True}, {})}, "both no_op and replace_with"),
        ({"block_configs": block({}, {"intermediate_size": "linear"})}, "makes no sense: 'linear' is no size"),
        ({"block_configs": block({"window_length": 128}, {})}, "layer 0 has attention.window_length"),
        ({"block_configs": block({"n_heads_in_group": 5}, {})}, "layer 0: 64 heads in groups of 5"),
        ({"block_configs": block({}, {"moe": {"num_local_experts": 8}})}, "layer 0 has ffn.moe"),
        ({"block_configs": block({}, {"hidden_act": "gelu"})}, "layer 0 has ffn.hidden_act"),
        ({"num_hidden_layers": 2}, "80 block_configs for num_hidden_layers=2"),
        ({"hidden_size": "wide"}, "makes no sense"),
        ({"vocab_size": 0}, "vocab_size: Input should be greater than or equal to 1"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused_with_its_values(changes: dict[str, Any], message: str) -> None:
    changes = {"num_hidden_layers": 1, **changes} if "block_configs" in changes else changes
    with pytest.raises(CheckpointError, match=message):
        Architecture.from_config({**super_49b(), **changes})


def test_a_missing_key_is_named() -> None:
    config = super_49b()
    del config["vocab_size"]
    with pytest.raises(CheckpointError, match=r"config.json lacks 'vocab_size'"):
        Architecture.from_config(config)


def test_kv_heads_have_to_divide_the_heads() -> None:
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 12, "num_attention_heads": 4}
    config |= {"num_key_value_heads": 3, "intermediate_size": 8, "num_hidden_layers": 1}
    with pytest.raises(CheckpointError, match="layer 0: 4 heads do not divide by 3 KV heads"):
        Architecture.from_config(config)
