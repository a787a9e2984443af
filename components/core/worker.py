"""One training process of a stage that runs as several: started by torchrun, reports on its standard output."""

import importlib
import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from components.core.config import Config
from components.core.job import Interrupted, Job, Placement, Resume
from components.core.runner import INTERRUPTED_EXIT_CODE, load_entry


class StandardOutput:
    """Writes events to standard output, a line each; the runner reads them there."""

    def emit(self, event: Mapping[str, object]) -> None:
        """Write one event."""
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


def main(order_file: Path) -> None:
    """Do what the order says as this rank; rank 0 leaves `result.json` beside it."""
    order = json.loads(order_file.read_text())
    module, _, name = order["config_class"].partition(":")
    config_class: type[Config] = getattr(importlib.import_module(module), name)
    placement = Placement.parse(order["placement"])
    torch.set_num_threads(placement.threads)
    dist.init_process_group("nccl" if placement.gpus else "gloo")
    asked = [False]
    signal.signal(signal.SIGTERM, lambda *_: asked.__setitem__(0, True))
    rank = int(os.environ["RANK"])
    job = Job(
        StandardOutput(), Resume(Path(order["resume"])), Path(order["scratch"]), placement, rank, lambda: asked[0]
    )
    inputs = {
        name: [Path(p) for p in value] if isinstance(value, list) else Path(value)
        for name, value in order["inputs"].items()
    }
    result = load_entry(order["entry"])(config_class.parse(order["config"]), job=job, out=Path(order["out"]), **inputs)
    if rank == 0:
        (order_file.parent / "result.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except Interrupted:
        sys.exit(INTERRUPTED_EXIT_CODE)
