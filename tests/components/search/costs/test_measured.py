"""Costs: counted against the architecture's own formulas, times split by hand, and measured once for real."""

import itertools
import json
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from components.core.base.errors import RecipeError
from components.core.model.architecture import Architecture
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext, quiet_context
from components.search.config import Measurement, Space
from components.search.costs.measured import (
    TimeSplit,
    counted_costs,
    measure_costs,
    own_costs_of,
    read_costs,
    shapes_to_measure,
    split_times,
)
from components.search.costs.resources import Costs, activation_bytes
from components.search.space.layer_space import PARTS, Shape, Variant, layer_spaces
from components.search.space.subblocks import heterogeneous_model, reshaped

SPACE = Space(ffn_fractions=(0.5,), num_key_value_heads=(2,))
SPACES = layer_spaces(SPACE, ((4, 64),) * 4)


@pytest.mark.parametrize("biased", [False, True])
def test_counts_add_up_to_the_architectures_own(parent: TesseraForCausalLM, biased: bool) -> None:
    parent.config.qkv_bias = parent.config.mlp_bias = biased
    model = heterogeneous_model(parent.config, ((4, 64),) * 5)
    space = SPACE.model_copy(update={"allow_plugin_only_blocks": True})
    fixed, blocks = counted_costs(model, layer_spaces(space, ((4, 64),) * 5))
    shape: Shape = ((4, 32), (2, 64), (0, 32), ("linear", 0), (2, "linear"))
    sizes = [(Variant("attention", heads), Variant("ffn", width)) for heads, width in shape]
    expected = Architecture.from_config(reshaped(model.config, shape).to_dict())
    assert fixed.parameters + sum(blocks[v].parameters for pair in sizes for v in pair) == expected.parameters
    assert sum(blocks[v].kv_bytes_per_token for pair in sizes for v in pair) == expected.kv_bytes_per_token
    child = heterogeneous_model(model.config, shape)
    assert child.num_parameters() == expected.parameters


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2), ("float8", 1)])
def test_memory_is_weights_and_cache_at_the_served_precision(
    parent: TesseraForCausalLM, dtype: Literal["float32", "bfloat16", "float8"], size: int
) -> None:
    measurement = Measurement(batch_size=3, prompt_tokens=5, new_tokens=2, dtype=dtype)
    fixed, blocks = counted_costs(parent, SPACES, measurement)
    own = Architecture.from_config(parent.config.to_dict())
    whole = sum((blocks[v] for v in (Variant("attention", 4), Variant("ffn", 64)) for _ in range(4)), start=fixed)
    assert whole.weight_bytes == size * own.parameters + max(0, 2 - size) * fixed.parameters
    assert whole.attention_layers == 4
    kv_bytes = own.kv_bytes_per_token // 2 * size * 3 * (5 + 2)
    assert whole.memory_bytes == whole.weight_bytes + kv_bytes + activation_bytes(own, measurement)
    longer = measurement.model_copy(update={"cached_tokens": 42})
    assert counted_costs(parent, SPACES, longer)[1][Variant("attention", 2)].memory_bytes == size * (
        blocks[Variant("attention", 2)].parameters + 42 * 2 * 2 * parent.config.head_dim
    )


def test_the_first_layer_of_a_measured_model_keeps_its_attention(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    assert shapes_to_measure(blocks, 3) == [
        ((4, 64), (4, 64), (4, 64)),
        ((2, 64), (2, 64), (2, 64)),
        ((4, 64), (0, 64), (0, 64)),
        ((4, 32), (4, 32), (4, 32)),
        ((4, 0), (4, 0), (4, 0)),
        ((4, 0), (0, 0), (0, 0)),
    ]


def test_linear_parts_are_measured_behind_a_first_layer_with_attention() -> None:
    attentions, ffns = (
        (Variant("attention", 4), Variant("attention", "linear")),
        (Variant("ffn", 64), Variant("ffn", "linear")),
    )
    blocks = {variant: Costs() for variant in attentions + ffns}
    assert shapes_to_measure(blocks, 2)[1:] == [
        ((4, 64), ("linear", 64)),
        ((4, 64), (0, 64)),
        ((4, "linear"), (4, "linear")),
        ((4, 0), (4, 0)),
        ((4, 0), (0, 0)),
    ]


def test_times_are_split_as_they_were_put_together(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    shapes = shapes_to_measure(blocks, 4)
    milliseconds = {4: 0.8, 2: 0.5, 0: 0.0}, {64: 0.3, 32: 0.2, 0: 0.0}
    heads, widths = milliseconds
    times = [1.5 + sum(heads[int(h)] + widths[int(w)] for h, w in shape) for shape in shapes]
    fixed, parts, explained = split_times(shapes, times)
    assert fixed == pytest.approx(1.5)
    expected = {("attention", 4): 0.8, ("attention", 2): 0.5, ("ffn", 64): 0.3, ("ffn", 32): 0.2}
    assert {(v.part, v.size): ms for v, ms in parts.items()} == pytest.approx(expected)
    assert explained == pytest.approx(times)


def test_the_spread_of_a_part_is_that_of_its_measurements(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    shapes = shapes_to_measure(blocks, 4)
    half, narrow = Variant("attention", 2), Variant("ffn", 32)

    def milliseconds(of_half: float) -> list[float]:
        parts = {Variant("attention", 4): 1.0, half: of_half, Variant("ffn", 64): 0.5, narrow: 0.25}
        return [
            2.0 + sum(parts.get(Variant("attention", h), 0) + parts.get(Variant("ffn", w), 0) for h, w in shape)
            for shape in shapes
        ]

    explained = TimeSplit.of(shapes, list(zip(*(milliseconds(ms) for ms in (0.5, 0.6, 0.9)), strict=True)))
    assert explained.parts[half] == pytest.approx(0.6)
    assert explained.spread[half] == pytest.approx(0.4)
    assert explained.spread[narrow] == pytest.approx(0, abs=1e-9)


def test_no_part_of_a_time_is_negative(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    fixed, parts, _ = split_times(shapes_to_measure(blocks, 4), [10.0, 9.0, 1.0, 10.5, 2.0, 3.0])
    assert fixed >= 0
    assert all(ms >= 0 for ms in parts.values())


def test_a_folder_without_one_json_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one JSON file, not 0"):
        read_costs(tmp_path)
    (tmp_path / "costs.json").write_text('{"fixed": {}, "block": {}}')
    with pytest.raises(RecipeError, match=r"unknown key 'costs\.block'"):
        read_costs(tmp_path)


def test_costs_of_an_earlier_version_are_counted_anew(parent: TesseraForCausalLM, tmp_path: Path) -> None:
    fixed, blocks = counted_costs(parent, SPACES)
    told = {
        "fixed": {"parameters": fixed.parameters, "latency_ms": 1.0},
        "blocks": {v.name: {"parameters": costs.parameters, "latency_ms": 0.5} for v, costs in blocks.items()},
        "machine": {"device": "elsewhere", "threads": 1, "versions": {}},
        "measurement": {"dtype": "bfloat16"},
        "models": [],
    }
    (tmp_path / "costs.json").write_text(json.dumps(told))
    table = own_costs_of(parent, SPACES, tmp_path)
    assert table.blocks["attention-2"].attention_layers == 1
    assert table.blocks["ffn-32"].weight_bytes == 2 * blocks[Variant("ffn", 32)].parameters
    assert (table.fixed.latency_ms, table.blocks["ffn-32"].latency_ms) == (1.0, 0.5)
    assert table.blocks["ffn-32"].request_ms == 0  # not known


def test_costs_are_measured_in_vllm(parent: TesseraForCausalLM, tmp_path: Path) -> None:
    context: StageContext = quiet_context(tmp_path)
    space = Space(ffn_fractions=(), num_key_value_heads=())
    measurement = Measurement(batch_size=2, prompt_tokens=4, new_tokens=4, rounds=2)
    table = measure_costs(parent, layer_spaces(space, ((4, 64),) * 4), measurement, context)
    assert set(table.blocks) == {"attention-4", "attention-0", "ffn-64", "ffn-0"}
    assert [model.num_key_value_heads for model in table.models] == [(4,) * 4, (4, 0, 0, 0), (4,) * 4, (4, 0, 0, 0)]
    assert all(len(model.step_ms) == 2 and model.median_ms > 0 for model in table.models)
    assert all(len(model.first_token_ms) == 2 and model.median_first_token_ms > 0 for model in table.models)
    assert set(table.spread) == {"fixed", "attention-4", "ffn-64"}
    for costs in (table.fixed, *table.blocks.values()):
        assert costs.request_ms == pytest.approx(costs.time_to_first_token_ms + 3 * costs.latency_ms)
    # On a busy machine all of so small a model's time may go to the fixed part.
    assert table.fixed.latency_ms + table.blocks["attention-4"].latency_ms + table.blocks["ffn-64"].latency_ms > 0
    assert table.machine.versions["torch"] == version("torch")


@pytest.mark.parametrize("seed", range(20))
def test_times_are_split_with_the_least_error_of_all_that_are_not_negative(seed: int) -> None:
    generator = np.random.default_rng(seed)
    blocks = {Variant(part, size): Costs() for part in PARTS for size in (4, 3, 2, 1)}
    shapes = shapes_to_measure(blocks, 2)
    times = generator.uniform(1.0, 3.0, len(shapes))
    fixed, parts, totals = split_times(shapes, times.tolist())
    assert min(fixed, *parts.values()) >= 0

    variants = list(parts)
    counts = np.array(
        [[1.0, *(sum(layer[PARTS.index(v.part)] == v.size for layer in s) for v in variants)] for s in shapes]
    )
    relative = counts / times[:, None]
    least = min(
        float(((relative[:, columns] @ found - 1) ** 2).sum())
        for size in range(1, counts.shape[1] + 1)
        for columns in map(list, itertools.combinations(range(counts.shape[1]), size))
        if (found := np.linalg.lstsq(relative[:, columns], np.ones(len(times)), rcond=None)[0]).min() >= 0
    )
    assert float(((np.array(totals) / times - 1) ** 2).sum()) == pytest.approx(least)
