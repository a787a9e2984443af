"""Where and how wide a stage runs."""

from components.core.base.config import Config


class Placement(Config):
    """Where and how wide a stage runs; never part of what it computes, so never part of its key."""

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
        """CPU threads of a vLLM that is timed: one where it computes on them, so that others disturb it less."""
        return 1 if self.gpus == 0 else self.threads
