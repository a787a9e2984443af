"""What a recipe runs on: this machine, measured in a few seconds, or devices that a user names. Imports no torch."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from components.core.base.errors import InputError
from components.core.base.suggestions import nearest
from components.core.model.accelerators import DEVICES, Device
from components.core.runtime.monitoring.gpus import gpu_use
from components.core.runtime.placement import Placement
from components.search.costs.roofline import STREAMED
from components.search.costs.work_time import Computer
from pipelines.recipe.setting_rules.facts import gflops

MACHINE_SPEED = "components.search.costs.machine_speed"
"""Run as a process of its own: it imports torch."""
MEASURE_TIMEOUT_S = 600.0
"""A few seconds are enough on a machine with nothing else to do."""
BUSY_LOAD = 1.5
"""Processes that want to run, for each CPU of the machine, from which on its measured speed is not to be trusted."""
MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Bytes that a container may take, or `max`."""


@dataclass(frozen=True)
class Machine:
    """A node.

    Attributes:
        processor: None where its speed is not known.
        gpu: one of its GPUs; None where there is none, or where it is not known.
        gpus: how many.
        cores: of the processor.
        memory_bytes: of the node; None where it is not known.
        is_named: whether the user has named its devices: then they take the place of every stage's placement.
        load: processes that wanted to run, for each CPU, in the minute before its speed was measured; None where
            nothing was measured.
    """

    processor: Device | None
    gpu: Device | None
    gpus: int
    cores: int
    memory_bytes: int | None
    is_named: bool = False
    load: float | None = None

    @property
    def busy_warning(self) -> str | None:
        """What to know of a speed that was measured beside much other work; None where there was little."""
        if self.load is None or self.load <= BUSY_LOAD:
            return None
        return (
            f"the speed was measured on a busy machine, with {self.load:.1f} processes to run for each CPU: it may be "
            "too low; then predicted times are too long, and trainings whose steps are chosen by it too short; measure "
            "again when the machine has less to do"
        )

    def computer(self, placement: Placement, *, spreads: bool) -> Computer | None:
        """What computes a stage; None where its speed is not known.

        Args:
            placement: of the stage.
            spreads: whether the stage can run as several ranks.
        """
        if self.is_named:
            device = self.gpu or self.processor
            return None if device is None else Computer(device, self.gpus if spreads and self.gpu else 1)
        if placement.gpus:
            return None if self.gpu is None else Computer(self.gpu, placement.num_ranks if spreads else 1)
        if self.processor is None:
            return None
        return Computer(slowed(self.processor, placement.num_ranks * placement.threads / self.cores))

    def num_ranks(self, placement: Placement, *, spreads: bool) -> int:
        """Ranks of a stage."""
        if not spreads:
            return 1
        return self.gpus if self.is_named and self.gpu else placement.num_ranks


def slowed(processor: Device, share: float) -> Device:
    """A processor of which a share of the cores works: it multiplies slower; memory is about as fast."""
    if share >= 1:
        return processor
    return processor.model_copy(update={"flops": {dtype: share * rate for dtype, rate in processor.flops.items()}})


def this_machine() -> Machine:
    """This machine, with the speed that it is measured to have; without torch its speed is not known."""
    cores, gpus = len(os.sched_getaffinity(0)), len(gpu_use())
    load = os.getloadavg()[0] / (os.cpu_count() or 1)  # before the measurement, which is work too
    return Machine(
        processor=_measured("--threads", str(cores)),
        gpu=_measured("--gpu") if gpus else None,
        gpus=gpus,
        cores=cores,
        memory_bytes=_memory_bytes(),
        load=load,
    )


def named_machine(text: str) -> Machine:
    """A machine of one kind of devices, such as `H100:8`; of `CPU:16`, the number is of cores.

    Raises:
        InputError: no such device, or no number of them.
    """
    name, colon, number = text.partition(":")
    if name.upper() not in DEVICES:
        raise InputError(f"--device {text}: no device {name!r}", hint=nearest(name.upper(), list(DEVICES)))
    if colon and not (number.isdecimal() and int(number) > 0):
        raise InputError(f"--device {text!r} is not of the form NAME:COUNT", hint="such as H100:8")
    device, count = DEVICES[name.upper()], int(number or 1)
    if device.name == "CPU":
        flops = {dtype: count * rate for dtype, rate in device.flops.items()}
        return Machine(device.model_copy(update={"flops": flops}), None, 0, count, None, is_named=True)
    return Machine(None, device, count, 0, None, is_named=True)


def speed_in_words(device: Device) -> str:
    """What a device reaches, and how that is known."""
    computer = Computer(device)
    rates = " and ".join(f"{gflops(computer.flops(dtype))} GFLOPS in {dtype}" for dtype in ("float32", "bfloat16"))
    return f"{rates}, {STREAMED * device.bytes_per_s / 1e9:,.1f} GB/s of memory ({device.source})"


def _measured(*options: str) -> Device | None:
    """The device that a process measures; None where it cannot."""
    command = [sys.executable, "-m", MACHINE_SPEED, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MEASURE_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None
    return Device.model_validate_json(done.stdout) if done.returncode == 0 else None


def _memory_bytes() -> int:
    """Memory of this machine, or of the container that this process is in."""
    total = int(psutil.virtual_memory().total)
    limit = MEMORY_LIMIT.read_text().strip() if MEMORY_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdecimal() else total
