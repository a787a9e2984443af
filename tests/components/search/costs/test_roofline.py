"""Predicted costs: by hand, against the counts of a real model, and against published figures."""

import statistics

import pytest

from components.core.base.errors import RecipeError
from components.core.model.accelerators import DEVICES, Device, device_named
from components.core.model.architecture import Architecture, BlockConfig
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.search.config import Measurement, SearchConfig, Space
from components.search.costs.measured import architecture_of, measure_costs
from components.search.costs.resources import Costs, model_costs
from components.search.costs.roofline import CACHED, COMPUTED, STREAMED, largest_batch, predicted, predicted_model
from components.search.space.layer_space import layer_spaces, servable_spaces
from tests.bench.published import SUPER_49B, ULTRA_253B
from tests.bench.roofline import rows

SLOW = Device(
    name="slow",
    memory_bytes=4 << 30,
    bytes_per_s=1e9,
    flops={"bfloat16": 1e10},
    link_bytes_per_s=1e8,
    subblock_s=0.0,
    link_s=0.0,
)
ONE_LAYER = Architecture(
    family="llama",
    vocab_size=10,
    hidden_size=8,
    num_attention_heads=2,
    head_dim=4,
    blocks=(BlockConfig(num_key_value_heads=1, intermediate_size=16),),
)
LOAD = Measurement(batch_size=2, prompt_tokens=6, new_tokens=4, dtype="bfloat16")


@pytest.mark.parametrize(
    ("name", "cores", "clock_hz"),
    [
        ("A100", 6912, 1.41e9),
        ("H100", 16896, 1.98e9),
        ("H200", 16896, 1.98e9),
        ("B200", 18944, 1.98e9),
        ("L40S", 18176, 2.52e9),
    ],
)
def test_float32_is_multiplied_without_tf32(name: str, cores: int, clock_hz: float) -> None:
    """Each core finishes a product and a sum in every cycle."""
    assert DEVICES[name].flops["float32"] == pytest.approx(2 * cores * clock_hz, rel=0.005)


def test_an_ffn_is_its_weights_its_hidden_states_and_its_products() -> None:
    _, (_, ffn) = model_costs(ONE_LAYER, LOAD)
    weights = 3 * 8 * 16 + 8
    assert ffn.parameters == weights
    found = predicted(ffn, ONE_LAYER, LOAD, SLOW)
    step = (2 * weights + 4 * 2 * 8 * 2) / (STREAMED * 1e9) + 2 * weights * 2 / (COMPUTED * 1e10)
    first = (2 * weights + 4 * 12 * 8 * 2) / (STREAMED * 1e9) + 2 * weights * 12 / (COMPUTED * 1e10)
    assert found.latency_ms == pytest.approx(1000 * step)
    assert found.time_to_first_token_ms == pytest.approx(1000 * first)
    assert found.request_ms == pytest.approx(1000 * (first + 3 * step))


def test_an_attention_reads_its_cache_in_decode_and_compares_all_pairs_in_prefill() -> None:
    _, (attention, _) = model_costs(ONE_LAYER, LOAD)
    weights = 2 * 8 * (8 + 4) + 8
    found = predicted(attention, ONE_LAYER, LOAD, SLOW)
    cached = 2 * 1 * 4 * 2  # K and V, one head of 4, 2 bytes
    step = (2 * weights + 4 * 2 * 8 * 2) / (STREAMED * 1e9) + 2 * weights * 2 / (COMPUTED * 1e10)
    assert found.latency_ms == pytest.approx(1000 * (step + 2 * (6 + 2) * cached / (CACHED * 1e9)))
    pairs = 4 * (12 * 6 / 2) * 8 / (COMPUTED * 1e10)
    first = (2 * weights + 4 * 12 * 8 * 2) / (STREAMED * 1e9) + 2 * weights * 12 / (COMPUTED * 1e10)
    assert found.time_to_first_token_ms == pytest.approx(1000 * (first + 12 * cached / (CACHED * 1e9) + pairs))


def test_devices_share_the_work_and_sum_what_they_found() -> None:
    _, (_, ffn) = model_costs(ONE_LAYER, LOAD)
    alone = predicted(ffn, ONE_LAYER, LOAD, SLOW).latency_ms
    shared = predicted(ffn, ONE_LAYER, LOAD.model_copy(update={"tensor_parallel": 2}), SLOW).latency_ms
    hidden = 2 * 8 * 2
    summed = 2 * (1 / 2) * hidden / (STREAMED * 1e8)
    assert shared == pytest.approx(alone / 2 + 1000 * (summed + 4 * hidden / (STREAMED * 1e9) / 2))


def test_predicted_costs_of_the_parts_are_those_of_the_model(parent: TesseraForCausalLM, context: StageContext) -> None:
    load = LOAD.model_copy(update={"device": "H100", "dtype": "float8"})
    spaces = layer_spaces(Space(ffn_fractions=(0.5,), num_key_value_heads=(2,)), ((4, 64),) * 4)
    table = measure_costs(parent, spaces, load, context)
    own = table.blocks["attention-4"] + table.blocks["ffn-64"]
    whole = sum((own for _ in range(4)), start=table.fixed)
    expected = predicted_model(architecture_of(parent), load, DEVICES["H100"])
    assert whole.model_dump() == pytest.approx(expected.model_dump())
    assert table.blocks["ffn-0"].request_ms == table.blocks["attention-0"].memory_bytes == 0
    assert table.machine.device == "H100, predicted"


def test_fp8_quadruples_what_float32_caches_beside_its_weights() -> None:
    card = DEVICES["H100"].model_copy(update={"memory_bytes": 1 << 40})
    sizes = [
        largest_batch(SUPER_49B, LOAD.model_copy(update={"dtype": d}), card, 1 << 40) for d in ("float8", "float32")
    ]
    free, whole, outside = (1 << 40) - (2 << 30), SUPER_49B.parameters, 2 * 128_256 * 8192 + 8192
    assert sizes[0] / sizes[1] == pytest.approx(4 * (free - whole - outside) / (free - 4 * whole), rel=1e-4)


def test_the_models_of_the_published_figures_are_the_released_ones() -> None:
    assert SUPER_49B.parameters == 49_867_145_216
    assert ULTRA_253B.parameters == 253_401_268_224
    assert ULTRA_253B.kv_bytes_per_token == 262_144


def test_published_figures_are_predicted() -> None:
    errors = [abs(row.ratio - 1) for row in rows() if row.ratio is not None]
    assert statistics.median(errors) < 0.075
    assert sum(error <= 0.15 for error in errors) >= 25
    assert max(errors) < 0.3


def test_what_a_device_cannot_do_is_refused() -> None:
    _, (_, ffn) = model_costs(ONE_LAYER, LOAD)
    with pytest.raises(RecipeError, match="A100 does not compute in float8"):
        predicted(ffn, ONE_LAYER, LOAD.model_copy(update={"dtype": "float8"}), DEVICES["A100"])
    with pytest.raises(RecipeError, match="CPU has no link for tensor_parallel=2"):
        predicted(ffn, ONE_LAYER, LOAD.model_copy(update={"tensor_parallel": 2}), DEVICES["CPU"])
    with pytest.raises(RecipeError, match=r"no such device; did you mean 'H200'\?"):
        SearchConfig.parse({"measurement": {"device": "h20"}}, where="search")


def test_devices_are_known_by_the_names_that_machines_give_them() -> None:
    found = device_named("NVIDIA H100 80GB HBM3")
    assert found is not None
    assert found.name == "H100"
    assert device_named("AMD EPYC, 2 CPUs") == DEVICES["CPU"]
    assert device_named("another") is None
    own = SearchConfig.parse({"measurement": {"device": SLOW.model_dump()}}, where="search").measurement.device
    assert own == SLOW


def test_more_devices_than_heads_hold_copies_of_them() -> None:
    def costs(devices: int) -> Costs:
        return model_costs(ONE_LAYER, LOAD.model_copy(update={"tensor_parallel": devices}))[1][0]

    cache = 2 * 2 * 1 * 4 * 2 * (6 + 4)  # bytes, K and V, one head of 4, two requests of ten tokens
    assert costs(1).memory_bytes == costs(1).weight_bytes + cache
    assert costs(2).memory_bytes == costs(1).weight_bytes + 2 * cache
    assert costs(2).kv_bytes_per_token == costs(1).kv_bytes_per_token


def test_what_devices_cannot_share_is_not_offered() -> None:
    space = Space(ffn_fractions=(0.5, 0.125), num_key_value_heads=(2, 1))
    spaces = layer_spaces(space, ((4, 48),) * 2)
    (_, shared) = servable_spaces(spaces, 4)
    assert [variant.size for variant in shared.attention] == [4, 2, 1, 0]
    assert [variant.size for variant in shared.ffn] == [48, 24, 0]  # 6 channels do not divide by 4
    assert servable_spaces(spaces, 1) == spaces
    with pytest.raises(RecipeError, match=r"the parent's ffn-48 of layer 0 cannot be shared by .*tensor_parallel=5"):
        servable_spaces(layer_spaces(Space(num_key_value_heads=()), ((5, 48),)), 5)
