"""Times of training and generation by hand, and what is measured of this machine."""

import pytest
import torch

from components.core.model.accelerators import DEVICES, Device
from components.core.model.architecture import Architecture, BlockConfig
from components.core.runtime.placement import Placement
from components.search.config import Measurement
from components.search.costs import machine_speed
from components.search.costs.machine_speed import measure
from components.search.costs.roofline import COMPUTED, STREAMED, predicted_model
from components.search.costs.work_time import OPTIMIZER_BYTES, TRAINED, Computer, subblocks

SHAPE = Architecture(
    family="llama",
    vocab_size=100,
    hidden_size=64,
    num_attention_heads=2,
    head_dim=32,
    blocks=(
        BlockConfig(num_key_value_heads=2, intermediate_size=10),
        BlockConfig(num_key_value_heads=None, intermediate_size=10),
    ),
)
FAST = Device(
    name="fast", memory_bytes=1, bytes_per_s=1e9 / STREAMED, flops={"float32": 1e9 / COMPUTED}, subblock_s=1e-3
)


def test_a_training_is_products_and_the_optimizer_and_starts() -> None:
    took = Computer(FAST).training_s(6e9, "float32", steps=10, micro_batches=2, shape=SHAPE)
    assert subblocks(SHAPE) == 3
    starts = 3 * 10 * 2 * 3 * 1e-3
    assert took == pytest.approx(6 / TRAINED + 10 * OPTIMIZER_BYTES * SHAPE.parameters / 1e9 + starts)


def test_devices_share_a_training_and_a_precision_that_is_not_there_is_float32() -> None:
    assert Computer(FAST, 4).computing_s(4e9, "bfloat16") == pytest.approx(1 / TRAINED)
    assert Computer(FAST).computed_dtype("bfloat16") == "float32"
    assert Computer(DEVICES["H100"]).computed_dtype("bfloat16") == "bfloat16"


def test_requests_are_answered_batch_by_batch_on_each_device() -> None:
    load = Measurement(batch_size=8, prompt_tokens=16, new_tokens=32)
    one = predicted_model(SHAPE, load, FAST).request_ms / 1000
    assert Computer(FAST).generation_s(SHAPE, load, 17) == pytest.approx(3 * one)
    assert Computer(FAST, 2).generation_s(SHAPE, load, 17) == pytest.approx(2 * one)


def test_this_machine_is_measured_as_a_device() -> None:
    threads = torch.get_num_threads()
    found = measure(DEVICES["CPU"], "here", Placement(threads=1))
    torch.set_num_threads(threads)
    assert found.flops.keys() == {"float32", "bfloat16"}
    assert all(1e8 < rate < 1e14 for rate in found.flops.values())
    assert 1e8 < found.bytes_per_s < 1e13
    assert found.source.startswith("the best of 5 short measurements")


class SharedMachine:
    """A clock of a machine that does the work slowly beside other programs, but for the moments between them."""

    def __init__(self) -> None:
        self.now, self.pauses = 0.0, 0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.pauses += 1

    def work(self, seconds: float) -> torch.Tensor:
        self.now += seconds if self.pauses == 2 else 25 * seconds
        return torch.zeros(1)


def test_a_speed_is_that_of_the_best_moment_of_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SharedMachine()
    monkeypatch.setattr(machine_speed, "time", machine)
    found = machine_speed.best_times([lambda: machine.work(0.001), lambda: machine.work(0.004)])
    assert found == pytest.approx([0.001, 0.004])
    assert machine.pauses == machine_speed.BURSTS - 1
