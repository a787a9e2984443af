"""Processes, threads, devices and node pool of a stage."""

from typing import Self

from pydantic import model_validator

from components.core.base.config import Config


class Placement(Config):
    """Processes, threads, devices and node pool of a stage; they change no result, so they are not in its key."""

    processes: int = 1
    """Training processes (ranks) of the stage."""
    threads: int = 2
    """CPU threads a process."""
    gpus: int = 0
    """GPUs the stage asks for, one a process."""
    node_pool: str | None = None
    """Value of the node label `tessera.dev/pool` that the stage asks for on a cluster."""
    memory_gib: float = 8.0
    """Memory the stage asks for, GiB."""

    @model_validator(mode="after")
    def _a_gpu_for_each_process(self) -> Self:
        if 0 < self.gpus < self.processes:
            raise ValueError(
                f"processes={self.processes} need a GPU each, and gpus={self.gpus}: set gpus to as many or to 0"
            )
        return self

    @property
    def engine_threads(self) -> int:
        """CPU threads of a timed vLLM: one on a CPU, so that other processes disturb the timing less."""
        return 1 if self.gpus == 0 else self.threads
