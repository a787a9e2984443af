"""Costs: counted against the architecture's own formulas, measured on an imaginary machine and once for real."""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import pytest

from components.core.base.errors import RecipeError
from components.core.model.architecture import Architecture, BlockConfig
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext, quiet_context
from components.core.serving.engine import BatchTime
from components.search.config import Measurement, Space
from components.search.costs.measured import (
    counted_costs,
    measure_costs,
    own_costs_of,
    read_costs,
    shapes_to_measure,
)
from components.search.costs.resources import Costs, CostTable, activation_bytes, measured_layers
from components.search.space.layer_space import Shape, Variant, layer_spaces
from components.search.space.subblocks import heterogeneous_model, reshaped
from tests.components.conftest import Recorder

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


def llama(layers: int, hidden_size: int, vocab_size: int) -> Architecture:
    """A model whose FFN has four times as many channels as its residual stream."""
    block = BlockConfig(num_key_value_heads=2, intermediate_size=4 * hidden_size)
    return Architecture(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_attention_heads=2,
        head_dim=hidden_size // 2,
        blocks=(block,) * layers,
    )


@pytest.mark.parametrize(
    ("parent", "dtype", "layers"),
    [
        (llama(32, 4096, 128_256), "bfloat16", 4),  # a layer alone has more than 128 MiB
        (llama(30, 512, 256), "float32", 8),  # 16 MiB a layer, and norms
        (llama(30, 512, 256), "bfloat16", 16),
        (llama(30, 512, 49_152), "float32", 4),  # the head has 96 MiB
        (llama(12, 128, 320), "float32", 12),
        (llama(3, 4096, 128_256), "float32", 3),
    ],
)
def test_few_layers_are_measured_and_those_of_a_small_parent_all(
    parent: Architecture, dtype: Literal["float32", "bfloat16"], layers: int
) -> None:
    assert measured_layers(parent, Measurement(dtype=dtype)) == layers
    assert measured_layers(parent, Measurement(dtype=dtype, num_layers=7)) == 7


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


class ImaginaryMachine:
    """Stands in for vLLM: every request to measure takes the next table of step times, and is remembered."""

    def __init__(self, *tables: list[list[float]]) -> None:
        self._tables = list(tables)
        self.measured: list[list[str]] = []
        self.files: set[str] = set()

    def __call__(
        self, folders: Sequence[Path], *_: object, report: object, random_weights: bool
    ) -> list[list[BatchTime]]:
        self.measured.append([folder.name for folder in folders])
        self.files |= {file.name for folder in folders for file in folder.iterdir()}
        assert random_weights
        return [[BatchTime(10 * ms, ms) for ms in model] for model in self._tables.pop(0)]


def measured_on(
    machine: ImaginaryMachine, parent: TesseraForCausalLM, context: StageContext, monkeypatch: pytest.MonkeyPatch
) -> CostTable:
    """Costs of the parent's sub-blocks and of halves of them."""
    monkeypatch.setattr("components.search.costs.measured.measure_times", machine)
    return measure_costs(parent, SPACES, Measurement(rounds=3), context)


AGREEING = [[10.0] * 3, [9.0, 9.1, 9.2], [7.0] * 3, [8.0] * 3, [6.0] * 3, [4.0] * 3]
"""Step times of the models of `shapes_to_measure`: 4 + 1 an attention, 0.75 one of two heads, 0.5 an FFN …"""


def test_models_that_agree_with_their_sizes_are_measured_once(
    parent: TesseraForCausalLM, recorded_context: StageContext, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = ImaginaryMachine(AGREEING)
    measured_on(machine, parent, recorded_context, monkeypatch)
    assert [len(folders) for folders in machine.measured] == [6]
    assert machine.files == {"config.json"}
    assert recorder.notes == []


@pytest.mark.parametrize("really_slower", [False, True])
def test_a_model_slower_than_a_larger_one_is_measured_again_with_the_parent(
    really_slower: bool,
    parent: TesseraForCausalLM,
    recorded_context: StageContext,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wrong = [AGREEING[0], [22.0, 22.1, 22.2], *AGREEING[2:]]
    again_ms = 11.0 if really_slower else 9.0
    again = [[20.0] * 6, [2 * again_ms] * 6]  # the machine has half its speed
    machine = ImaginaryMachine(wrong, again)
    table = measured_on(machine, parent, recorded_context, monkeypatch)
    assert machine.measured[1:] == [["measured-0", "measured-1"]]
    assert table.models[1].step_ms == pytest.approx((22.0, 22.1, 22.2, *[again_ms] * 6))
    assert table.models[1].median_ms == pytest.approx(again_ms)
    smaller, larger = (table.blocks[name].latency_ms for name in ("attention-2", "attention-4"))
    assert (smaller == pytest.approx(larger)) if really_slower else (smaller < larger)
    slower = "layers of attention-2 and ffn-64 took longer than of attention-4 and ffn-64"
    expected = [f"{slower}: measured again, in 6 rounds", f"{slower}, measured again too: a kernel may pad"]
    notes = [note for note in recorder.notes if note.startswith("layers of")]
    assert len(notes) == 1 + really_slower
    assert all(note.startswith(text) for note, text in zip(notes, expected, strict=False))


def test_costs_are_measured_in_vllm(parent: TesseraForCausalLM, tmp_path: Path) -> None:
    context: StageContext = quiet_context(tmp_path)
    space = Space(ffn_fractions=(), num_key_value_heads=())
    measurement = Measurement(batch_size=2, prompt_tokens=4, new_tokens=4, rounds=2)
    table = measure_costs(parent, layer_spaces(space, ((4, 64),) * 4), measurement, context)
    assert set(table.blocks) == {"attention-4", "attention-0", "ffn-64", "ffn-0"}
    assert [model.num_key_value_heads for model in table.models] == [(4,) * 4, (4, 0, 0, 0), (4,) * 4, (4, 0, 0, 0)]
    # Times of so small models may contradict their sizes; those are measured in four rounds more.
    assert {len(model.step_ms) for model in table.models} <= {2, 6}
    assert all(len(model.first_token_ms) == len(model.step_ms) for model in table.models)
    assert all(model.median_ms > 0 and model.median_first_token_ms > 0 for model in table.models)
    assert set(table.spread) == {"fixed", "attention-4", "ffn-64"}
    for costs in (table.fixed, *table.blocks.values()):
        assert costs.request_ms == pytest.approx(costs.time_to_first_token_ms + 3 * costs.latency_ms)
    # On a busy machine all of so small a model's time may go to the fixed part.
    assert table.fixed.latency_ms + table.blocks["attention-4"].latency_ms + table.blocks["ffn-64"].latency_ms > 0
    assert table.machine.versions["torch"] == version("torch")
