"""Names of the processors that vLLM computes on, for keys and records of measured times. Imports no torch."""

import functools
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CPU_INFO = Path("/proc/cpuinfo")
VISIBLE_GPUS = "CUDA_VISIBLE_DEVICES"
"""Environment variable with the GPUs that a process may use, by number or name."""
QUERY_TIMEOUT_S = 60.0
UNKNOWN_GPU = "unknown GPU"
"""Name where the driver's tool is absent or names no GPU."""


def vllm_uses_gpu() -> bool:
    """Whether the installed vLLM is the build for GPUs."""
    try:
        version("vllm")
    except PackageNotFoundError:
        return False
    return True


def timing_device() -> str:
    """The processors that vLLM times models on, as they call themselves, with their number."""
    return gpu_names() if vllm_uses_gpu() else cpu_name()


@functools.cache
def cpu_name() -> str:
    """The processor of this machine, with the number of its CPUs."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} CPUs"


@functools.cache
def gpu_names() -> str:
    """The NVIDIA GPUs that this process can see, with their number; asked of the driver's own tool."""
    names = _of_each_gpu("name")
    if not names:
        return UNKNOWN_GPU
    return f"{', '.join(sorted(set(names)))}, {len(names)} GPUs"


def visible_gpus() -> list[str]:
    """The GPUs that this process can use, as `CUDA_VISIBLE_DEVICES` lists them; empty where no driver names any."""
    if VISIBLE_GPUS in os.environ:
        return [gpu.strip() for gpu in os.environ[VISIBLE_GPUS].split(",") if gpu.strip()]
    return _of_each_gpu("index")


def _of_each_gpu(field: str) -> list[str]:
    """What the driver's tool says of each GPU; empty where it does not answer."""
    tool = shutil.which("nvidia-smi")
    command = [tool or "", f"--query-gpu={field}", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_TIMEOUT_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in listed.splitlines() if line.strip()]
