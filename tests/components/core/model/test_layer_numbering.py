from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.base.errors import CheckpointError
from components.core.model.architecture import Architecture
from components.core.model.layer_numbering import GAP, name_in_files, name_in_model, with_gaps

NUMBERS = st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True).map(sorted)
OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "model.layers.norm", "model.layers")


def config_of(depth: int) -> dict[str, Any]:
    """A heterogeneous configuration of layers that all differ."""
    attention = {"no_op": False, "n_heads_in_group": 2}
    blocks = [{"attention": attention, "ffn": {"no_op": False, "intermediate_size": 8 + n}} for n in range(depth)]
    return {
        "model_type": "nemotron-nas",
        "vocab_size": 16,
        "hidden_size": 8,
        "num_attention_heads": 2,
        "num_hidden_layers": depth,
        "block_configs": blocks,
    }


@given(NUMBERS, st.sampled_from(["mlp.up_proj.weight", "self_attn.q_proj.bias", "input_layernorm.weight"]))
def test_names_go_back_and_forth(numbers: list[int], rest: str) -> None:
    for place, number in enumerate(numbers):
        assert name_in_files(f"model.layers.{place}.{rest}", numbers) == f"model.layers.{number}.{rest}"
        assert name_in_model(f"model.layers.{number}.{rest}", numbers) == f"model.layers.{place}.{rest}"
    for name in OUTSIDE:
        assert name_in_files(name, numbers) == name_in_model(name, numbers) == name


@given(NUMBERS)
def test_a_configuration_with_gaps_has_the_same_layers(numbers: list[int]) -> None:
    config = config_of(len(numbers))
    plain, spread = Architecture.from_config(config), Architecture.from_config(with_gaps(config, numbers))
    assert list(spread.layer_numbers) == numbers
    assert spread.without_gaps() == plain
    assert spread.block_configs() == config["block_configs"]
    assert set(spread.weight_shapes()) == {name_in_files(name, numbers) for name in plain.weight_shapes()}


def test_a_gap_is_behind_what_the_layer_before_it_is_behind() -> None:
    config = {**config_of(3), "parent_layers": [2, 5, 7]}
    assert with_gaps(config, [1, 3, 6])["parent_layers"] == [0, 2, 2, 5, 5, 5, 7]


def test_a_model_of_gaps_alone_is_refused() -> None:
    config = {**config_of(1), "block_configs": [GAP], "skips_layers": True}
    with pytest.raises(CheckpointError, match="blocks"):
        Architecture.from_config(config)


def test_without_the_key_an_empty_layer_stays_a_layer() -> None:
    config = with_gaps(config_of(2), [0, 2])
    del config["skips_layers"]
    shape = Architecture.from_config(config)
    assert [block.is_empty for block in shape.blocks] == [False, True, False]
    assert list(shape.layer_numbers) == [0, 1, 2]
