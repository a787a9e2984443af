"""How fast this machine is, as a device that times can be predicted for.

Measured in a second or two: products of matrices in each precision, and a copy in memory. What they reach is taken as
the share of a peak that the roofline model assumes, so that its predictions are of what was measured.

`python -m components.search.costs.machine_speed` prints the device as JSON; it is a process of its own, because plans
are made without torch.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from components.core.model.accelerators import DEVICES, Device, Dtype, device_named
from components.core.runtime.devices import device_of
from components.core.runtime.hardware import cpu_name, gpu_names
from components.core.runtime.placement import Placement
from components.search.costs.roofline import COMPUTED, STREAMED

ROUNDS, ROUNDS_S = 5, 0.1
"""Times that each is measured at least, and time that this takes at least; the shortest counts, since other programs on
the machine make a time only longer."""
SMALLEST, LARGEST = 256, 8192
"""Rows and columns of the matrices: doubled until a product takes `LONG_S`, which a processor without instructions for
bfloat16 needs for small ones already."""
LONG_S = 0.02
COPIED_VALUES = 1 << 26
"""Values of the tensor that is copied: 256 MiB, more than any cache holds."""
MEASURED: tuple[Dtype, ...] = ("float32", "bfloat16")


def measure(known: Device, name: str, placement: Placement) -> Device:
    """A device with the rates that it has here.

    Args:
        known: its memory, its link to others, and what it takes to start kernels.
        name: what it calls itself.
        placement: threads and GPUs.

    Raises:
        InputError: a GPU is asked for, and PyTorch finds none.
    """
    torch.set_num_threads(placement.threads)
    device = device_of(placement)
    source = torch.zeros(COPIED_VALUES, device=device)
    target = torch.empty_like(source)
    copied_per_s = 2 * source.nbytes / _seconds(lambda: target.copy_(source))  # it is read and written
    rates = {
        "flops": {dtype: _flops(dtype, device) / COMPUTED for dtype in MEASURED},
        "bytes_per_s": copied_per_s / STREAMED,
        "source": "measured: products of matrices, and a copy in memory",
    }
    return known.model_copy(update={"name": name, **rates})


def _flops(dtype: Dtype, device: torch.device) -> float:
    """Operations a second of a product of square matrices."""
    size = SMALLEST
    while True:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        seconds = _seconds(partial(torch.mm, a, b))
        if seconds >= LONG_S or size >= LARGEST:
            return float(2 * size**3 / seconds)
        size *= 2


def _seconds(work: Callable[[], Tensor]) -> float:
    """Shortest time of some work, after a first time that does not count; reading a value waits for a GPU."""
    times: list[float] = []
    while len(times) <= ROUNDS or sum(times[1:]) < ROUNDS_S:
        started = time.perf_counter()
        work().flatten()[0].item()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main() -> None:
    """Print the processor, or the first GPU if it is one whose data sheet is known."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gpu", action="store_true")
    options = parser.parse_args()
    if options.gpu:
        name = gpu_names()
        known = device_named(name)
        if known is None:
            parser.error(f"no data sheet of {name}")
        found = measure(known, name, Placement(gpus=1))
    else:
        name = f"{cpu_name()}, {options.threads} threads"
        found = measure(DEVICES["CPU"], name, Placement(threads=options.threads))
    sys.stdout.write(found.model_dump_json() + "\n")


if __name__ == "__main__":
    main()
