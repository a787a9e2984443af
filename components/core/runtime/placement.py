"""Processes, threads, devices and node pool of a stage."""

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

    @property
    def engine_threads(self) -> int:
        """CPU threads of a timed vLLM: one on a CPU, so that other processes disturb the timing less."""
        return 1 if self.gpus == 0 else self.threads
