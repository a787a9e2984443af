"""How busy the GPUs are that this process can see."""

import shutil
import subprocess
from typing import NamedTuple

QUERY_TIMEOUT_S = 5.0
"""Shorter than the time after which Prometheus gives up a scrape."""


class GpuUse(NamedTuple):
    """What the driver says of one GPU."""

    number: str
    utilization: float
    """Fraction of the last sample period, up to a second, in which a kernel ran."""
    memory_bytes: float


def gpu_use() -> list[GpuUse]:
    """The use of every GPU, asked of the driver's own tool; empty where there is none, or where it does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=index,utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True).stdout
        rows = [line.split(", ") for line in listed.splitlines()]
        return [GpuUse(number, float(percent) / 100, float(mib) * 2**20) for number, percent, mib in rows]
    except (OSError, subprocess.SubprocessError, ValueError):  # a slice of a GPU has no utilization: [N/A]
        return []
