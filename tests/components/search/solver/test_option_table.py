"""Costs at another batch: counted anew, and times as the roofline has them."""

import pytest

from components.core.base.errors import InputError
from components.core.model.accelerators import DEVICES
from components.core.model.architecture import Architecture
from components.search.config import Measurement
from components.search.costs.resources import Machine
from components.search.costs.roofline import predicted_model
from components.search.search_table import SearchTable
from components.search.solver import option_table
from components.search.solver.option_table import OptionTable
from tests.pipelines.made_up_run import SEARCH

SHAPE = Architecture.from_config(
    {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "num_hidden_layers": 12,
    }
)


def at_batch(search: SearchTable, batch: int) -> OptionTable:
    return option_table.at_batch(
        search, batch, measurement=search.measurement, parent=search.architecture, processor=search.machine.device
    )


def search(measurement: Measurement, device: str = "AMD EPYC, 2 CPUs") -> SearchTable:
    machine = Machine(device=device, threads=1, versions={})
    return SEARCH.model_copy(update={"architecture": SHAPE, "measurement": measurement, "machine": machine})


def test_measured_times_stay_at_their_own_batch_and_grow_with_it() -> None:
    own = search(Measurement(batch_size=32))
    same, twice = at_batch(own, 32), at_batch(own, 64)
    parent = own.parent_choice
    assert same.costs(parent).latency_ms == pytest.approx(own.costs(parent).latency_ms)
    assert own.costs(parent).latency_ms < twice.costs(parent).latency_ms < 2 * own.costs(parent).latency_ms
    assert twice.costs(parent).parameters == own.costs(parent).parameters
    cache = twice.costs(parent).memory_bytes - same.costs(parent).memory_bytes
    assert cache > 32 * 48 * own.costs(parent).kv_bytes_per_token  # beside activations


def test_predicted_costs_are_predicted_anew() -> None:
    load = Measurement(batch_size=4, dtype="bfloat16", device="L40S")
    found = at_batch(search(load), 16)
    expected = predicted_model(SHAPE, load.model_copy(update={"batch_size": 16}), DEVICES["L40S"])
    per_layer = [(s.options[0].costs.latency_ms, s.options[0].costs.parameters) for s in found.slots]
    assert found.fixed.latency_ms < expected.latency_ms
    assert all(ms > 0 and parameters > 0 for ms, parameters in per_layer)
    assert found.batch_tokens == 16 * load.new_tokens


def test_a_machine_that_nothing_is_known_of_is_told() -> None:
    with pytest.raises(InputError, match="no data sheet of 'abacus'"):
        at_batch(search(Measurement(), device="abacus"), 8)
