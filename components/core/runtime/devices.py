"""Decides where a stage computes: its device, process group and device mesh, all from `placement`.

No other module asks CUDA anything. Two rules follow from that: each rank computes on a GPU of its own, and a stage
whose placement has no GPU stays on the CPU, also on a machine that has one.
"""

import gc
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import Store

from components.core.base.errors import InputError
from components.core.runtime.placement import Placement, refuse_offload_without_gpu

DATA_PARALLEL = "dp"
"""Name of the mesh axis over which parameters are sharded."""


def device_of(placement: Placement) -> torch.device:
    """The device of this process: on a GPU placement that of its local rank, else the CPU.

    Raises:
        InputError: the placement asks for a GPU and PyTorch can use none here, or it is to offload without one.
    """
    if placement.gpus == 0:
        refuse_offload_without_gpu(placement)
        return torch.device("cpu")
    if not _has_gpu():
        raise InputError(
            f"placement.gpus is {placement.gpus}, and PyTorch finds no GPU on this machine",
            hint="set placement.gpus to 0, or run the stage where there is an NVIDIA GPU with its driver",
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def device_name(device: torch.device) -> str:
    """Name of a device as its driver has it; empty for the CPU."""
    return _gpu_name(device) if device.type == "cuda" else ""


def join_process_group(placement: Placement, store: Store, rank: int, world_size: int) -> None:
    """Select the device of this rank, then join the process group.

    The order matters: what CUDA allocates before a device is selected lies on the first GPU, for every rank.
    """
    device = device_of(placement)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend_of(device), store=store, rank=rank, world_size=world_size)


def backend_of(device: torch.device) -> str:
    """The process group's backends: gloo for tensors on the CPU, and NCCL for those on GPUs."""
    return "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"


def mesh_of(device: torch.device) -> DeviceMesh:
    """All ranks in one axis. Without a mesh of its device, FSDP would choose a GPU wherever there is one."""
    return init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(DATA_PARALLEL,))


def memory_bytes(device: torch.device, placement: Placement) -> int:
    """Memory that a rank may take: that of its GPU, or its share of what the placement asks for."""
    if device.type == "cuda":
        return _gpu_memory_bytes(device)
    return int(placement.memory_gib * 2**30 / placement.processes)


def free_memory(device: torch.device) -> None:
    """Give the memory of models that are gone back to a GPU, so that another process can have it."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def peak_gpu_bytes() -> int:
    """The most that tensors of this process took of one GPU; 0 where it used none."""
    if not torch.cuda.is_initialized():
        return 0
    return max(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))


def _has_gpu() -> bool:
    return torch.cuda.is_available()


def _gpu_memory_bytes(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).total_memory)


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)
