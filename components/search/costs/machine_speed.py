"""How fast this machine is, as a device that times can be predicted for.

Measured in a few seconds: products of matrices in each precision, and a copy in memory. What they reach is taken as
the share of a peak that the roofline model assumes, so that its predictions are of what was measured.

`python -m components.search.costs.machine_speed` prints the device as JSON; it is a process of its own, because plans
are made without torch.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from components.core.model.accelerators import DEVICES, Device, Dtype, device_named
from components.core.runtime.devices import device_of
from components.core.runtime.hardware import cpu_name, gpu_names
from components.core.runtime.placement import Placement
from components.search.costs.roofline import COMPUTED, STREAMED

BURSTS, PAUSE_S = 5, 0.2
"""Short measurements of each, and the time between two, seconds; the shortest time of all counts."""
ROUNDS, BURST_S = 3, 0.05
"""Times that each is measured in a burst at least, and time that this takes at least, seconds."""
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
    products = [_product(dtype, device) for dtype in MEASURED]
    copy_s, *product_s = best_times([lambda: target.copy_(source), *(product for product, _ in products)])
    flops = [flops / seconds for (_, flops), seconds in zip(products, product_s, strict=True)]
    rates = {
        "flops": {dtype: rate / COMPUTED for dtype, rate in zip(MEASURED, flops, strict=True)},
        "bytes_per_s": 2 * source.nbytes / copy_s / STREAMED,  # it is read and written
        "source": f"the best of {BURSTS} short measurements of products of matrices, and of a copy in memory",
    }
    return known.model_copy(update={"name": name, **rates})


def _product(dtype: Dtype, device: torch.device) -> tuple[Callable[[], Tensor], int]:
    """A product of square matrices that are large enough, and its operations."""
    size = SMALLEST
    while True:
        a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
        product = partial(torch.mm, a, b)
        if size >= LARGEST or _seconds(product) >= LONG_S:
            return product, 2 * size**3
        size *= 2


def best_times(works: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Shortest time of each work, seconds: other programs make a time only longer.

    The works are measured in turn, in bursts with a pause between them, so that one of the bursts meets the machine
    with little else to do, and no work has the good moments to itself.
    """
    best = [math.inf] * len(works)
    for number in range(BURSTS):
        if number:
            time.sleep(PAUSE_S)
        best = [min(before, _seconds(work)) for before, work in zip(best, works, strict=True)]
    return best


def _seconds(work: Callable[[], Tensor]) -> float:
    """Shortest time of a work in one burst, after a first time that does not count; reading a value waits for a GPU."""
    times: list[float] = []
    while len(times) <= ROUNDS or sum(times[1:]) < BURST_S:
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
