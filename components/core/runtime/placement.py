"""Processes, threads, devices and node pool of a stage, and what its pod asks of a cluster."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from components.core.base.config import Config
from components.core.base.errors import InputError

TAINT = r"^[A-Za-z0-9][\w./-]*(=[\w.-]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?$"
"""A taint as `kubectl taint` writes it."""
SHARED_CORES = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment variables of processes that share cores, where the user has not set them. By default a thread that waits
for the others of its process spins, and takes the core from another process. PyTorch and vLLM use GNU's OpenMP."""


class Placement(Config):
    """Processes, threads, devices and node pool of a stage; they change no result, so they are not in its key."""

    nodes: int = Field(default=1, ge=1)
    """Pods that a stage works in on a cluster, as one `TrainJob`; all else here is for one of them. On one machine the
    ranks of all nodes run there."""
    processes: int = 1
    """Processes (ranks) of a node: of a training, or replicas of the evaluation, each with a vLLM server of its own."""
    threads: int = 2
    """CPU threads a process."""
    gpus: int = 0
    """GPUs a node asks for, one a process."""
    offload: bool = False
    """Keep weights, gradients and optimizer state of a training in the memory of the node, and update them there; a GPU
    has the layers that it computes. Slower, for a model that its memory does not hold."""
    node_pool: str | None = None
    """Pool of nodes on a cluster: a local queue of Kueue (by default `gpu` or `cpu`) where the pipeline is compiled
    with queues, else the value of the node label `tessera.dev/pool`."""
    memory_gib: float = 8.0
    """Memory a node asks for, GiB."""
    shared_memory_gib: float = Field(default=1.0, gt=0)
    """Size of `/dev/shm` in a pod, GiB, a part of its memory; vLLM and ranks pass tensors through it."""
    disk_gib: float | None = Field(default=None, gt=0)
    """Most that a pod may write to its working folder, GiB; Kubernetes evicts a pod that writes more."""
    tolerations: tuple[Annotated[str, Field(pattern=TAINT)], ...] = ()
    """Taints of nodes that a pod tolerates, `KEY[=VALUE][:EFFECT]`; pods with GPUs always tolerate `nvidia.com/gpu`."""
    priority: str | None = None
    """Kueue's priority class of a pod; a pod of a higher class preempts this one, which then resumes."""

    @model_validator(mode="after")
    def _a_gpu_for_each_process(self) -> Self:
        if 0 < self.gpus < self.processes:
            raise ValueError(
                f"processes={self.processes} need a GPU each, and gpus={self.gpus}: set gpus to as many or to 0"
            )
        return self

    @property
    def num_ranks(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.processes

    @property
    def engine_threads(self) -> int:
        """CPU threads of a timed vLLM: one on a CPU, so that other processes disturb the timing less."""
        return 1 if self.gpus == 0 else self.threads


def refuse_offload_without_gpu(placement: Placement, label: str = "") -> None:
    """Refuse to keep a training out of the memory of a GPU where none computes it.

    Args:
        placement: of the stage.
        label: of the stage, for the message, where several are checked.

    Raises:
        InputError: the placement asks for that.
    """
    if placement.offload and not placement.gpus:
        where = f"{label}: " if label else ""
        raise InputError(
            f"{where}placement.offload keeps a training out of the memory of a GPU, and placement.gpus is 0",
            hint="leave offload out, or set placement.gpus",
        )
