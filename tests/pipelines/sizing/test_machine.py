"""What a recipe runs on: devices that are named, a share of a processor, and this machine."""

from dataclasses import replace

import pytest

from components.core.base.errors import InputError
from components.core.model.accelerators import DEVICES
from components.core.runtime.placement import Placement
from components.search.costs.work_time import Computer
from pipelines.sizing.machine import Machine, named_machine, speed_in_words, this_machine

ONE, FOUR = Placement(), Placement(processes=4, gpus=4)


def test_named_devices_take_the_place_of_every_placement() -> None:
    machine = named_machine("h100:8")
    assert (machine.gpu, machine.gpus) == (DEVICES["H100"], 8)
    shared, alone = machine.computer(ONE, spreads=True), machine.computer(FOUR, spreads=False)
    assert shared is not None
    assert alone is not None
    assert (shared.count, alone.count) == (8, 1)
    assert (machine.num_ranks(ONE, spreads=True), machine.num_ranks(FOUR, spreads=False)) == (8, 1)


def test_cores_of_a_named_processor_multiply_together() -> None:
    computer = named_machine("CPU:4").computer(ONE, spreads=True)
    assert computer is not None
    assert computer.count == 1
    assert computer.device.flops["float32"] == 4 * DEVICES["CPU"].flops["float32"]


@pytest.mark.parametrize(("text", "told"), [("H1000:8", "did you mean 'H100'"), ("H100:0", "such as H100:8")])
def test_a_device_that_is_not_known_is_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        named_machine(text)


def test_a_stage_has_the_share_of_the_processor_that_its_placement_says() -> None:
    machine = Machine(DEVICES["CPU"], None, 0, 8, 1 << 30)
    computer = machine.computer(Placement(processes=2, threads=2), spreads=True)
    assert computer is not None
    assert computer.device.flops["float32"] == DEVICES["CPU"].flops["float32"] / 2
    assert machine.num_ranks(Placement(processes=2, threads=2), spreads=True) == 2
    assert machine.computer(FOUR, spreads=True) is None  # there is no GPU


def test_this_machine_has_cores_memory_and_a_measured_speed() -> None:
    machine = this_machine()
    assert machine.cores >= 1
    assert machine.memory_bytes is not None
    assert machine.memory_bytes > 1 << 28
    assert machine.processor is not None
    assert machine.processor.flops["float32"] > 1e8
    assert machine.load is not None
    assert machine.load >= 0
    assert "(the best of 5 short measurements of products of matrices, and of a copy in memory)" in speed_in_words(
        machine.processor
    )


def test_a_speed_is_doubted_that_was_measured_beside_much_other_work() -> None:
    idle = Machine(DEVICES["CPU"], None, 0, 2, 1 << 30, load=1.2)
    assert idle.busy_warning is None
    assert named_machine("CPU:2").busy_warning is None
    assert "with 5.7 processes to run for each CPU" in str(replace(idle, load=5.7).busy_warning)


def test_a_speed_is_told_as_it_is_reached() -> None:
    computer = Computer(DEVICES["CPU"])
    assert f"{computer.flops('float32') / 1e9:.0f} GFLOPS in float32" in speed_in_words(DEVICES["CPU"])
