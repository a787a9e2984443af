"""Runs a stage as several processes (ranks) under torchrun, on one node or on several.

torchrun starts the ranks, restarts all of them after a crash, and keeps their error files and their standard error.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from pydantic import JsonValue

from components.core.base.config import Config
from components.core.base.errors import ProcessKilled, StageFailed, TesseraError, parse_error
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.placement import SHARED_CORES, Placement
from components.core.runtime.stage import Stage
from components.core.store.store import Store

POLL_S = 0.1
ORDER, RESULT, LOGS = "order.json", "result.json", "torchrun"
"""In the scratch folder: the arguments of the ranks, what rank 0 returned, and torchrun's log folder."""
GPU_PEAK = "gpu-peak"
"""There too, with a rank's number after it: what its tensors took of its GPU at most, bytes."""
MAX_RESTARTS = 2
"""How often torchrun starts the ranks again after one of them crashed, was killed or raised an exception.

On several nodes never: the agents of other nodes do not notice such a restart, so Trainer starts all pods again.
"""
RANK_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
"""Environment variables of the ranks. With the threshold of other stages (`stage_command`), gathered weights and what
is computed with them cut up each other's memory, and a rank grows to twice the size."""
NODE_RANK = "PET_NODE_RANK"
"""Environment variable of a pod of a `TrainJob` with the number of its node. Trainer sets it, and torchrun reads it and
PET_NNODES, PET_MASTER_ADDR and PET_MASTER_PORT."""

KILLED = "a process was killed"


def run_ranks(
    stage: Stage,
    home: tuple[Store, str],
    config: Config,
    *,
    context: StageContext,
    out: Path,
    **paths: Path | list[Path],
) -> dict[str, JsonValue]:
    """Run the ranks of a stage that belong to this node, each of which calls its `run` with the same arguments.

    When a rank ends with anything but a `TesseraError`, torchrun ends the others and restarts all ranks from the last
    checkpoint. In a pod of a `TrainJob` the pod ends instead, and Trainer restarts all of them.

    Args:
        stage: what to run.
        home: the store that takes a copy of each checkpoint, and the stage key of the checkpoints.
        config: the stage's checked configuration.
        context: the stage's context in this process; events of rank 0 go to its reporter.
        out: folder with an empty folder for each output.
        paths: local folders of the inputs.

    Returns:
        What rank 0 returned; nothing on a node without it.

    Raises:
        TesseraError: what a rank raised; `StageFailed` if the ranks failed in another way after all restarts.
        Interrupted: the stage was asked to stop, and the ranks have saved a checkpoint.
    """
    order = {
        "entry": stage.entry,
        "config_class": f"{type(config).__module__}:{type(config).__qualname__}",
        "config": config.model_dump(mode="json"),
        "inputs": {name: [str(p) for p in v] if isinstance(v, list) else str(v) for name, v in paths.items()},
        "out": str(out),
        "resume": str(context.resume.folder),
        "home": [home[0].uri, str(home[0].local), home[1]],
        "placement": context.placement.model_dump(mode="json"),
        "stage_pid": os.getpid(),
    }
    (context.scratch / ORDER).write_text(json.dumps(order))
    status = _torchrun(context)
    if status == 0:
        if node_rank():
            return {}
        result: dict[str, JsonValue] = json.loads((context.scratch / RESULT).read_text())
        return result
    raise _failure(stage, context, status)


def node_rank() -> int | None:
    """The number of this node among the pods of a `TrainJob`; None where this process is in no such pod."""
    return int(os.environ[NODE_RANK]) if NODE_RANK in os.environ else None


def _topology(placement: Placement) -> list[str]:
    """Torchrun's options for the ranks that it starts here; in a pod of a `TrainJob` it reads the rest from PET_*."""
    count = f"--nproc-per-node={_ranks_here(placement)}"
    if node_rank() is None:
        return ["--standalone", count, f"--max-restarts={MAX_RESTARTS}"]
    return [count, "--max-restarts=0"]


def _ranks_here(placement: Placement) -> int:
    """Ranks on this machine: all of them, or in a pod of a `TrainJob` those of one node."""
    return placement.num_ranks if node_rank() is None else placement.processes


def rank_environment(placement: Placement) -> dict[str, str]:
    """Environment variables that torchrun starts with, and its ranks and their servers of vLLM with it."""
    shared = SHARED_CORES if _ranks_here(placement) > 1 else {}
    return {**shared, **os.environ, **RANK_ALLOCATOR}


def _torchrun(context: StageContext) -> int:
    """Run torchrun to its end and report the events of rank 0; returns the exit status."""
    command = [sys.executable, "-m", "torch.distributed.run", *_topology(context.placement)]
    command += [f"--log-dir={context.scratch / LOGS}", "--tee=2"]  # standard error: to files, and to the stage's log
    command += ["-m", "components.core.runtime.rank_main", str(context.scratch)]
    with (
        # In its own session, so that Ctrl-C does not reach it: it cannot handle a second signal during its shutdown.
        subprocess.Popen(
            command,
            env=rank_environment(context.placement),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process,
        _ended_early(context, process),
    ):
        assert process.stdout is not None
        for line in process.stdout:  # rank 0 writes its events here, one a line
            with contextlib.suppress(ValueError):
                context.reporter.emit(json.loads(line))
    return process.returncode


@contextlib.contextmanager
def _ended_early(context: StageContext, process: "subprocess.Popen[str]") -> Iterator[None]:
    """Send torchrun one SIGTERM if the stage is asked to stop, or if a rank raised an error that a restart repeats.

    torchrun passes the signal on to its ranks and does not restart them. It has no option for errors that it should
    not restart after.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            if context.stopping() or _tessera_error(context.scratch) is not None:
                process.terminate()
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    except BaseException:
        process.kill()
        raise
    finally:
        done.set()
        watcher.join()


def _failure(stage: Stage, context: StageContext, status: int) -> BaseException:
    """What `run_ranks` raises when torchrun ended with an error."""
    if context.stopping():
        return Interrupted()
    error = _tessera_error(context.scratch)
    if error is not None:
        return error
    attempts = sorted((context.scratch / LOGS).glob("*/attempt_*"))
    how = describe_failure(attempts[-1]) if attempts else "torchrun could not start the processes"
    # Where a node is lost, the ranks of the others end with exceptions, which look like those of the stage's own code.
    kind = ProcessKilled if how == KILLED or node_rank() is not None else StageFailed
    return kind(
        f"{stage.name}: {how}",
        hint=f"torchrun ended with status {status}, the log has the details; where memory ran out, smaller batches or "
        "fewer processes help; the same command goes on from the last checkpoint",
    )


def describe_failure(attempt: Path) -> str:
    """Why the ranks ended, in words: a crash in native code, else the first exception, else a process was killed.

    Args:
        attempt: torchrun's log folder of one start of the ranks.
    """
    for log in sorted(attempt.glob("*/stderr.log")):
        for line in log.read_text(errors="replace").splitlines():
            if line.startswith("Fatal Python error"):  # written by faulthandler, which `record` enables
                return f"process {log.parent.name} crashed ({line})"
    for rank, text in _exceptions(attempt):
        return f"process {rank} stopped: {text}"
    return KILLED


def _tessera_error(scratch: Path) -> TesseraError | None:
    """The first error of ours that a rank has raised in any attempt, None where there is none."""
    for attempt in (scratch / LOGS).glob("*/attempt_*"):
        for _, text in _exceptions(attempt):
            if (error := parse_error(text)) is not None:
                return error
    return None


def _exceptions(attempt: Path) -> list[tuple[str, str]]:
    """Rank and `NAME: MESSAGE` of each exception in torchrun's error files, the first that was raised first.

    The first is the cause: after it, the other ranks fail because they cannot reach its rank. The files order them by
    the time of the last write, because torchrun's own timestamps are whole seconds.
    """
    found = []
    for path in sorted(attempt.glob("*/error.json"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(ValueError):  # a file that is being written
            found.append((path.parent.name, json.loads(path.read_text())["message"]["message"]))
    return found
