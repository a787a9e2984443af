"""The options of each layer, and what is refused."""

import subprocess
import sys

import pytest

from components.core.errors import RecipeError
from components.search.config import BlocksConfig, Limits, SearchConfig, Space
from components.search.space import Shape, Size, layer_spaces


def sizes(space: Space, shape: Shape) -> list[tuple[list[Size], list[Size]]]:
    spaces = layer_spaces(space, shape)
    return [([v.size for v in layer.attention], [v.size for v in layer.ffn]) for layer in spaces]


def test_the_parents_own_comes_first_and_the_first_layer_keeps_attention() -> None:
    assert sizes(Space(ffn_fractions=(0.25, 1.0, 0.5)), ((8, 512),) * 2) == [
        ([8, 4, 1], [512, 256, 128, 0]),
        ([8, 4, 1, 0], [512, 256, 128, 0]),
    ]


def test_a_parent_that_was_searched_before_keeps_its_no_ops() -> None:
    assert sizes(Space(no_op_ffn=False), ((4, 64), (0, 64), (2, 0)))[1:] == [([0], [64, 32, 16]), ([2, 1, 0], [0])]


def test_linear_parts_come_after_the_sizes_and_before_the_no_op() -> None:
    assert sizes(Space(ffn_fractions=(0.5,), linear_attention=True, linear_ffn=True), ((8, 512),) * 2) == [
        ([8, 4, 1, "linear"], [512, 256, "linear", 0]),
        ([8, 4, 1, "linear", 0], [512, 256, "linear", 0]),
    ]


def test_a_linear_part_of_a_parent_stays_or_goes() -> None:
    assert sizes(Space(linear_ffn=True), ((4, "linear"), ("linear", 64)))[0][1] == ["linear", 0]
    assert sizes(Space(no_op_attention=False), ((4, 64), ("linear", 64)))[1][0] == ["linear"]


def test_a_width_that_is_no_whole_number_is_refused_with_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"ffn_fractions=0.3 of intermediate_size=512 is 153.6 channels") as caught:
        layer_spaces(Space(ffn_fractions=(0.3,)), ((4, 512),))
    assert "154/512" in str(caught.value)


def test_heads_that_do_not_divide_are_refused_with_the_divisors() -> None:
    with pytest.raises(RecipeError, match=r"num_key_value_heads=3 does not divide the parent's 8") as caught:
        layer_spaces(Space(num_key_value_heads=(3,)), ((8, 512),))
    assert "choose from 1, 2, 4, 8" in str(caught.value)


@pytest.mark.parametrize("value", ["60", "-5%", "0%", "x%", 0, -1.0])
def test_a_limit_is_positive_or_a_share(value: str | float) -> None:
    with pytest.raises(RecipeError, match=r"search\.limits\.latency_ms"):
        SearchConfig.parse({"limits": {"latency_ms": value}}, where="search")


def test_a_misspelt_limit_is_told_the_right_one() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'limits\.latency'") as caught:
        SearchConfig.parse({"limits": {"latency": 1}})
    assert "did you mean 'latency_ms'?" in str(caught.value)


def test_a_shard_that_does_not_exist_is_refused() -> None:
    with pytest.raises(RecipeError, match="shard 2/2 does not exist"):
        BlocksConfig.parse({"shard": "2/2"})


def test_the_parts_of_the_search_share_their_settings() -> None:
    config = SearchConfig(seq_len=64, ffn_fractions=(0.5,), limits=Limits(parameters=10), seed=3)
    assert (config.prepare().seq_len, config.blocks("1/2").ffn_fractions) == (64, (0.5,))
    assert config.blocks("1/2").shard_index == (1, 2)
    other = config.model_copy(update={"limits": Limits(parameters=20)})
    assert config.prepare() == other.prepare()
    assert config.blocks() == other.blocks()


def test_declarations_solver_and_results_are_light() -> None:
    heavy = "{'torch', 'transformers', 'vllm'} & set(sys.modules)"
    modules = "config, results, solver, baselines, space, table"
    code = f"import sys\nfrom components.search import {modules}\nassert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)
