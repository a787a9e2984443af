"""The options of each layer, and what is refused."""

import re
import subprocess
import sys
from typing import Any

import pytest

from components.core.base.errors import RecipeError
from components.search.config import ImportanceConfig, LayerRules, LibraryConfig, Limits, SearchConfig, Space
from components.search.space.layer_space import Shape, Size, Variant, layer_spaces, left_out, servable


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
    assert (
        sizes(Space(ffn_fractions=(0.5,), allow_plugin_only_blocks=True), ((8, 512),) * 2)
        == [
            ([8, 4, 1, "linear", 0], [512, 256, "linear", 0]),
        ]
        * 2
    )


def test_a_linear_part_of_a_parent_stays_or_goes() -> None:
    assert sizes(Space(linear_ffn=True), ((4, "linear"), ("linear", 64)))[0][1] == ["linear", 0]
    assert sizes(Space(no_op_attention=False), ((4, 64), ("linear", 64)))[1][0] == ["linear"]


def test_what_vllm_cannot_run_is_left_out_with_a_sentence() -> None:
    shape = ((4, 64),) * 3
    assert left_out(Space(), shape) == (
        "left out, since vLLM cannot run it alone: attention-0 in layer 0, attention-linear in every layer, "
        "ffn-linear in every layer; search.allow_plugin_only_blocks=true offers it"
    )
    assert left_out(Space(allow_plugin_only_blocks=True), shape) is None
    quiet = Space(linear_attention=False, layers={"0": LayerRules(no_op_attention=False), "1": LayerRules(ffn="own")})
    assert left_out(quiet, shape) == (
        "left out, since vLLM cannot run it alone: ffn-linear in layers 0, 2; "
        "search.allow_plugin_only_blocks=true offers it"
    )


def test_rules_hold_for_their_layers_alone() -> None:
    space = Space.parse(
        {"ffn_fractions": [0.5], "layers": {0: {"ffn_fractions": [1]}, "2-3": {"no_op_attention": False}}}
    )
    assert sizes(space, ((4, 64),) * 4) == [
        ([4, 2, 1], [64, 0]),
        ([4, 2, 1, 0], [64, 32, 0]),
        ([4, 2, 1], [64, 32, 0]),
        ([4, 2, 1], [64, 32, 0]),
    ]


@pytest.mark.parametrize(
    ("rules", "attention", "ffn"),
    [
        ({"attention": "own", "ffn": "own"}, [4], [64]),
        ({"attention": 2, "ffn": 24}, [4, 2], [64, 24]),
        ({"attention": "no_op", "ffn": "no_op"}, [4, 0], [64, 0]),
        ({"attention": "linear", "ffn": "linear"}, [4, "linear"], [64, "linear"]),
    ],
)
def test_a_fixed_layer_is_offered_that_and_the_parents_own(
    rules: dict[str, Any], attention: list[Size], ffn: list[Size]
) -> None:
    space = Space.parse({"allow_plugin_only_blocks": True, "layers": {"1": rules}})
    found = layer_spaces(space, ((4, 64),) * 2)[1]
    assert ([v.size for v in found.attention], [v.size for v in found.ffn]) == (attention, ffn)
    assert found.fixed == (found.attention[-1], found.ffn[-1])


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"1": {"ffn_fractons": [0.5]}},
            r"unknown key 'search\.layers\.1\.ffn_fractons'.*mean 'ffn_fractions'",
        ),
        ({"one": {}}, r"search\.layers\.one"),
        ({"3-2": {}}, r"search\.layers\.3-2: the parent has 4 layers"),
        ({"2-4": {}}, r"search\.layers\.2-4: the parent has 4 layers.*from 0 to 3"),
        ({"0-2": {}, "2": {}}, r"search\.layers\.2: layer 2 has rules already"),
        ({"1": {"num_key_value_heads": [3]}}, r"num_key_value_heads=3 does not divide"),
        ({"1": {"attention": 3}}, r"num_key_value_heads=3 does not divide"),
        ({"1": {"ffn": "linear"}}, r"layer 1 cannot have ffn-linear: vLLM cannot run it alone"),
        ({"0": {"attention": "no_op"}}, r"layer 0 cannot have attention-0: vLLM cannot run it alone"),
        ({"3": {"ffn": 8}}, r"layer 3 cannot have ffn-8: the parent has ffn-0 there"),
        ({"1": {"ffn": 65}}, r"intermediate_sizes=65 is wider than the parent's 64 channels"),
    ],
)
def test_rules_that_no_layer_can_follow_are_refused(layers: dict[str, Any], message: str) -> None:
    shape: Shape = ((4, 64), (4, 64), (4, 64), (4, 0))
    with pytest.raises(RecipeError) as caught:
        layer_spaces(SearchConfig.parse({"layers": layers}, where="search"), shape)
    assert re.search(message, str(caught.value), re.DOTALL)


def test_widths_and_heads_of_wider_layers_are_left_out_in_narrower_ones() -> None:
    space = Space(ffn_fractions=(), intermediate_sizes=(64, 17), num_key_value_heads=(4, 2), no_op_attention=False)
    assert sizes(space, ((8, 100), (2, 17))) == [([8, 4, 2], [100, 64, 17, 0]), ([2], [17, 0])]


@pytest.mark.parametrize(("own", "offered"), [(1, []), (2, [1]), (5, [1]), (6, [3, 1]), (8, [4, 1])])
def test_heads_by_default_are_the_largest_divisor_below_and_one(own: int, offered: list[int]) -> None:
    (attention, _), *_ = sizes(Space(), ((own, 64),))
    assert attention == [own, *offered]


@pytest.mark.parametrize(
    ("variant", "devices"),
    [
        (Variant("attention", 4), {1, 2, 4, 8}),
        (Variant("attention", 1), {1, 2, 3, 4, 8}),
        (Variant("attention", 3), {1, 3}),
        (Variant("attention", 0), {1, 2, 3, 4, 8}),
        (Variant("attention", "linear"), {1, 2, 3, 4, 8}),
        (Variant("ffn", 12), {1, 2, 3, 4}),
        (Variant("ffn", "linear"), {1, 2, 3, 4, 8}),
    ],
)
def test_devices_share_heads_and_channels_or_copy(variant: Variant, devices: set[int]) -> None:
    assert {count for count in (1, 2, 3, 4, 8) if servable(variant, count)} == devices


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
        LibraryConfig.parse({"shard": "2/2"})


def test_the_parts_of_the_search_share_their_settings() -> None:
    config = SearchConfig(seq_len=64, ffn_fractions=(0.5,), limits=Limits(parameters=10), seed=3)
    library = config.part(LibraryConfig, shard="1/2")
    assert (config.part(ImportanceConfig).seq_len, library.ffn_fractions) == (64, (0.5,))
    assert library.shard_index == (1, 2)


def test_declarations_solver_and_results_are_light() -> None:
    heavy = "{'torch', 'transformers', 'vllm'} & set(sys.modules)"
    modules = (
        "declarations",
        "search_table",
        "solver.solve",
        "solver.baselines",
        "space.layer_space",
        "solver.fronts",
        "solver.explain",
        "scoring.score_table",
        "space.library_table",
        "costs.roofline",
    )
    imports = "".join(f"import components.search.{module}\n" for module in modules)
    code = f"import sys\n{imports}assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", code], check=True)
