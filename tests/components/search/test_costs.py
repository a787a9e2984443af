"""Costs: counted against the architecture's own formulas, times split by hand, and measured once for real."""

from pathlib import Path

import pytest
import torch

from components.core.architecture import Architecture
from components.core.errors import RecipeError
from components.core.job import Job, silent_job
from components.core.model import TesseraForCausalLM
from components.core.vllm_timing import REPEATS
from components.search.assemble import heterogeneous_model, reshaped
from components.search.config import Measurement, Space
from components.search.costs import counted_costs, explain, measure_costs, read_costs, shapes_to_measure
from components.search.space import Shape, Variant, layer_spaces
from components.search.table import Costs

SPACE = Space(ffn_fractions=(0.5,), num_key_value_heads=(2,))
SPACES = layer_spaces(SPACE, ((4, 64),) * 4)


@pytest.mark.parametrize("biased", [False, True])
def test_counts_add_up_to_the_architectures_own(parent: TesseraForCausalLM, biased: bool) -> None:
    parent.config.qkv_bias = parent.config.mlp_bias = biased
    model = heterogeneous_model(parent.config, ((4, 64),) * 5)
    space = SPACE.model_copy(update={"allow_unserved": True})
    fixed, blocks = counted_costs(model, layer_spaces(space, ((4, 64),) * 5))
    shape: Shape = ((4, 32), (2, 64), (0, 32), ("linear", 0), (2, "linear"))
    sizes = [(Variant("attention", heads), Variant("ffn", width)) for heads, width in shape]
    expected = Architecture.from_config(reshaped(model.config, shape).to_dict())
    assert fixed.parameters + sum(blocks[v].parameters for pair in sizes for v in pair) == expected.parameters
    assert sum(blocks[v].kv_bytes_per_token for pair in sizes for v in pair) == expected.kv_bytes_per_token
    child = heterogeneous_model(model.config, shape)
    assert child.num_parameters() == expected.parameters


def test_the_first_layer_of_a_measured_model_keeps_its_attention(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    assert shapes_to_measure(blocks, 3) == [
        ((4, 64), (4, 64), (4, 64)),
        ((2, 64), (2, 64), (2, 64)),
        ((4, 64), (0, 64), (0, 64)),
        ((4, 32), (4, 32), (4, 32)),
        ((4, 0), (4, 0), (4, 0)),
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
    ]


def test_times_are_split_as_they_were_put_together(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    shapes = shapes_to_measure(blocks, 4)
    milliseconds = {4: 0.8, 2: 0.5, 0: 0.0}, {64: 0.3, 32: 0.2, 0: 0.0}
    heads, widths = milliseconds
    times = [1.5 + sum(heads[int(h)] + widths[int(w)] for h, w in shape) for shape in shapes]
    fixed, parts, explained = explain(shapes, times)
    assert fixed == pytest.approx(1.5)
    expected = {("attention", 4): 0.8, ("attention", 2): 0.5, ("ffn", 64): 0.3, ("ffn", 32): 0.2}
    assert {(v.part, v.size): ms for v, ms in parts.items()} == pytest.approx(expected)
    assert explained == pytest.approx(times)


def test_no_part_of_a_time_is_negative(parent: TesseraForCausalLM) -> None:
    _, blocks = counted_costs(parent, SPACES)
    fixed, parts, _ = explain(shapes_to_measure(blocks, 4), [10.0, 9.0, 1.0, 10.5, 2.0])
    assert fixed >= 0
    assert all(ms >= 0 for ms in parts.values())


def test_a_folder_without_one_json_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="one JSON file, not 0"):
        read_costs(tmp_path)
    (tmp_path / "costs.json").write_text('{"fixed": {}, "block": {}}')
    with pytest.raises(RecipeError, match=r"unknown key 'costs\.block'"):
        read_costs(tmp_path)


def test_costs_are_measured_in_vllm(parent: TesseraForCausalLM, tmp_path: Path) -> None:
    job: Job = silent_job(tmp_path)
    space = Space(ffn_fractions=(), num_key_value_heads=())
    measurement = Measurement(batch_size=2, prompt_tokens=4, new_tokens=4, rounds=1)
    table = measure_costs(parent, layer_spaces(space, ((4, 64),) * 4), measurement, job)
    assert set(table.blocks) == {"attention-4", "attention-0", "ffn-64", "ffn-0"}
    assert [model.num_key_value_heads for model in table.models] == [(4,) * 4, (4, 0, 0, 0), (4,) * 4]
    assert all(len(model.step_ms) == REPEATS and model.median_ms > 0 for model in table.models)
    # On a busy machine all of so small a model's time may go to the fixed part.
    assert table.fixed.latency_ms + table.blocks["attention-4"].latency_ms + table.blocks["ffn-64"].latency_ms > 0
    assert table.machine.versions["torch"] == torch.__version__
