"""One process (rank) of a stage that runs as several: torchrun starts it; it reports on standard output."""

import functools
import importlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.multiprocessing.errors import record
from torch.distributed.rendezvous import rendezvous

from components.core.base.config import Config
from components.core.base.fault_injection import fault_point
from components.core.base.processes import end_with_owner
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.devices import join_process_group, peak_gpu_bytes
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.runtime.runner import INTERRUPTED_EXIT_CODE, load_entry
from components.core.runtime.torchrun import GPU_PEAK, ORDER, RESULT, describe_failure
from components.core.store.store import open_store


class StandardOutput:
    """Writes events to standard output, one a line; the process of the stage reads them there."""

    def emit(self, event: Mapping[str, object]) -> None:
        """Write one event."""
        sys.stdout.write(json.dumps(event) + "\n")
        sys.stdout.flush()


@record
def main(scratch: Path) -> None:
    """Run the stage as this rank, with the arguments of `ORDER`; rank 0 writes the result to `RESULT`.

    `record` writes an exception to torchrun's error file, and where Python was at a crash to standard error.
    """
    order = json.loads((scratch / ORDER).read_text())
    module, _, name = order["config_class"].partition(":")
    config_class: type[Config] = getattr(importlib.import_module(module), name)
    placement = Placement.parse(order["placement"])
    torch.set_num_threads(placement.threads)
    rank = int(os.environ["RANK"])
    if rank == 0:
        _empty_folders(Path(order["out"]))  # before the others, who wait for this rank
    rendezvous_store = _join_attempt(placement)
    fault_point("rank.begun")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    uri, local, key = order["home"]
    store = open_store(uri, local=Path(local))
    resume = Resume(Path(order["resume"]), mirror=functools.partial(store.push_resume, key))
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1:
        _agree_on_checkpoint(rendezvous_store, resume, functools.partial(store.resume_folder, key))
    context = StageContext(StandardOutput(), resume, scratch, placement, rank, stop.is_set)
    _report_restart(context)
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
    if placement.gpus:
        (scratch / f"{GPU_PEAK}-{rank}").write_text(str(peak_gpu_bytes()))
    dist.destroy_process_group()


def _join_attempt(placement: Placement) -> PrefixStore:
    """Join the process group of this attempt; returns the key-value store that its ranks share.

    torchrun keeps one store over its restarts. A prefix for each attempt keeps a rank from reading the address that
    another had before the restart.
    """
    store, rank, world_size = next(rendezvous("env://"))
    prefixed = PrefixStore(f"attempt_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    join_process_group(placement, prefixed, rank, world_size)
    return prefixed


def _agree_on_checkpoint(shared: PrefixStore, resume: Resume, download: Callable[[], object]) -> None:
    """Check that this node has the checkpoint that rank 0 resumes from.

    Each node downloaded the newest one when it started. A pod of an attempt before may have added one since.

    Args:
        shared: key-value store of all ranks.
        resume: the checkpoints of this node.
        download: downloads the newest checkpoint of the store.

    Raises:
        RuntimeError: this node cannot have that checkpoint; all nodes have to start again.
    """
    node, is_first_of_node = os.environ["GROUP_RANK"], os.environ["LOCAL_RANK"] == "0"
    if os.environ["RANK"] == "0":
        shared.set("checkpoint", _newest(resume))
    wanted = shared.get("checkpoint").decode()
    if is_first_of_node:
        if (found := _newest(resume)) != wanted:
            download()
            found = _newest(resume)
        shared.set(f"node-{node}", found)
    if (found := shared.get(f"node-{node}").decode()) != wanted:
        raise RuntimeError(f"node {node} has checkpoint {found}, and the first node resumes from {wanted}")


def _newest(resume: Resume) -> str:
    """Name of the newest valid checkpoint."""
    newest = resume.latest()
    return "none" if newest is None else newest.name


def _empty_folders(out: Path) -> None:
    """Remove what an attempt that crashed has left in the folders of the outputs."""
    for folder in out.iterdir():
        shutil.rmtree(folder)
        folder.mkdir()


def _report_restart(context: StageContext) -> None:
    """Report why torchrun has restarted the ranks, if it has."""
    count = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if count > 0:
        attempt = Path(os.environ["TORCHELASTIC_ERROR_FILE"]).parents[1]
        how = describe_failure(attempt.with_name(f"attempt_{count - 1}"))
        context.note(f"{how}; all processes start again from the last checkpoint")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    end_with_owner(os.getppid())  # torchrun
    end_with_owner(json.loads((folder / ORDER).read_text())["stage_pid"])
    try:
        main(folder)
    except Interrupted:
        sys.exit(INTERRUPTED_EXIT_CODE)
