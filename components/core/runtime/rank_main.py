"""One training process of a stage that runs as several: started by torchrun, reports on its standard output."""

import faulthandler
import functools
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from components.core.base.config import Config
from components.core.base.errors import TesseraError
from components.core.base.fault_injection import fault_point
from components.core.base.processes import on_exit_of
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.runtime.runner import INTERRUPTED_EXIT_CODE, load_entry
from components.core.runtime.torchrun import CRASH, FAILURE, ORDER, RESULT
from components.core.store.store import open_store


class StandardOutput:
    """Writes events to standard output, a line each; the runner reads them there."""

    def emit(self, event: Mapping[str, object]) -> None:
        """Write one event."""
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def main(scratch: Path) -> None:
    """Do what the order in the scratch folder says as this rank; rank 0 leaves the result beside it."""
    order = json.loads((scratch / ORDER).read_text())
    module, _, name = order["config_class"].partition(":")
    config_class: type[Config] = getattr(importlib.import_module(module), name)
    placement = Placement.parse(order["placement"])
    torch.set_num_threads(placement.threads)
    dist.init_process_group("nccl" if placement.gpus else "gloo")
    fault_point("rank.begun")
    asked = [False]
    signal.signal(signal.SIGTERM, lambda *_: asked.__setitem__(0, True))
    rank = int(os.environ["RANK"])
    uri, local, key = order["home"]
    mirror = functools.partial(open_store(uri, local=Path(local)).push_resume, key)
    resume = Resume(Path(order["resume"]), mirror=mirror)
    context = StageContext(StandardOutput(), resume, scratch, placement, rank, lambda: asked[0])
    inputs = {
        name: [Path(p) for p in value] if isinstance(value, list) else Path(value)
        for name, value in order["inputs"].items()
    }
    try:
        result = load_entry(order["entry"])(
            config_class.parse(order["config"]), context=context, out=Path(order["out"]), **inputs
        )
    finally:
        resume.wait()
    fault_point("rank.computed")
    if rank == 0:
        (scratch / RESULT).write_text(json.dumps(result))
    dist.destroy_process_group()


def tell(scratch: Path, error: BaseException) -> None:
    """Leave word of why this rank failed."""
    known = error if isinstance(error, TesseraError) else None
    failure = {
        "type": type(error).__name__,
        "message": known.message if known else str(error),
        "hint": known.hint if known else None,
        "exit_code": known.exit_code if known else None,
        "time": time.time(),
    }
    (scratch / FAILURE.format(os.environ["RANK"])).write_text(json.dumps(failure))


def end_at_once() -> None:
    """Leave no trace of this process: the stage that it works for has ended."""
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    on_exit_of(os.getppid(), end_at_once)  # torchrun
    on_exit_of(json.loads((folder / ORDER).read_text())["stage_pid"], end_at_once)
    faulthandler.enable((folder / CRASH.format(os.environ["RANK"])).open("w"))
    try:
        main(folder)
    except Interrupted as interrupted:
        tell(folder, interrupted)
        sys.exit(INTERRUPTED_EXIT_CODE)
    except Exception as error:
        tell(folder, error)
        raise
