"""Resume points of training: model, optimizer and random state. Each rank writes its part; any number can resume.

The tensors are safetensors in the layout of `torch.distributed.checkpoint`, so nothing is ever unpickled: a file says
which rows of the whole each of its tensors has.
"""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from components.core.runtime.context import StageContext
from components.core.runtime.devices import mesh_of

STATE, WHOLE = "state.json", "training.safetensors"
"""Files of a point: what is no tensor, and the tensors of a single process."""
_SEPARATOR = "/"
"""Separates the name of a parameter from that of its moment."""
FILE_BYTES = 64 << 20
"""About the size of a file of a rank. The library holds one file in memory while it writes."""
SENT_BYTES = 16 << 20
"""Bytes that are sent at once to the machine of rank 0."""
GROUP, MESH = "process group", "device mesh"
"""Keys in the memory of the resume points. Names of tensors have no spaces."""


def save_point(
    context: StageContext, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> None:
    """Save everything that a run needs to resume after `step`. Every rank calls it and writes its part.

    The values are copied in memory, and training goes on while the copies are written. If the stage is asked to stop,
    the function returns after they are written. Each resume point reuses the memory of the copies before it.
    """
    memory = context.resume.memory

    def copy() -> Callable[[Path], None]:
        if isinstance(model, FSDPModule) and GROUP not in memory:
            # Its own group, so that its collective operations are apart from those of the training.
            memory[GROUP], memory[MESH] = dist.new_group(backend="gloo"), mesh_of(torch.device("cpu"))
        group = memory.get(GROUP)
        tensors = {name: _copied(name, tensor, memory) for name, tensor in _tensors(model, optimizer).items()}
        text = json.dumps({"state": state, "random": bytes(torch.get_rng_state().tolist()).hex()})

        def write(folder: Path) -> None:
            if group is None:
                save_file(tensors, folder / WHOLE)
            else:
                _write_part(tensors, folder, group)
            if context.rank == 0:
                (folder / STATE).write_text(text)

        return write

    context.resume.save_in_background(step, copy, completes=context.rank == 0)
    if context.stopping():
        context.resume.wait()


def load_point(
    context: StageContext, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, dict[str, Any]] | None:
    """Load the newest resume point into model and optimizer; each rank reads its part.

    Returns:
        The step after which it was saved, and the state saved with it; None if there is no resume point.
    """
    point = context.resume.latest()
    if point is None:
        return None
    saved = json.loads((point / STATE).read_text())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # in a single process
        load(_tensors(model, optimizer), storage_reader=HuggingFaceStorageReader(str(point)))
    torch.set_rng_state(torch.tensor(list(bytes.fromhex(saved["random"])), dtype=torch.uint8))
    context.note(f"goes on from step {int(point.name)}")
    return int(point.name), saved["state"]


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters and the optimizer's state by name, as they are in memory; numbers as vectors of one value.

    Safetensors has no slices of a tensor without dimensions.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    moments: dict[str, dict[str, Tensor]] = get_optimizer_state_dict(model, optimizer)["state"]  # type: ignore[assignment]
    for parameter, values in moments.items():
        for name, value in values.items():
            tensors[f"{parameter}{_SEPARATOR}{name}"] = value if value.ndim else value.view(1)
    return tensors


def _copied(name: str, tensor: Tensor, memory: dict[str, Any]) -> Tensor:
    """A copy of a tensor, or of this rank's part of it, in the CPU's memory.

    The buffers are reused, because the system hands out new memory page by page, which takes several times as long as
    the copy.
    """
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    buffer = memory.get(name)
    if buffer is None or buffer.shape != own.shape or buffer.dtype != own.dtype:
        buffer = memory[name] = torch.empty(own.shape, dtype=own.dtype)
    buffer.copy_(own)
    if not isinstance(tensor, DTensor):
        return buffer
    return DTensor.from_local(
        buffer, memory[MESH], tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _write_part(tensors: dict[str, Tensor], folder: Path, group: dist.ProcessGroup) -> None:
    """Write this rank's part of the tensors to the folder of rank 0."""
    dist.barrier(group)  # rank 0 has made the folder
    folder.mkdir(parents=True, exist_ok=True)  # on another machine it is another one
    numbers, size, file_size = {}, 0, FILE_BYTES * dist.get_world_size(group)
    for name, tensor in tensors.items():
        numbers[name] = 1 + size // file_size
        size += tensor.numel() * tensor.element_size()
    writer = HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=numbers, save_distributed=True)
    save(tensors, storage_writer=writer, process_group=group)
    _send_missing(folder, group)


def _send_missing(folder: Path, group: dist.ProcessGroup) -> None:
    """Send the files of ranks on other machines to rank 0, which copies all of them to the store."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size(group)
    own = {path.name: path.stat().st_size for path in folder.glob(f"shard-{rank + 1:05d}-*")}
    written: list[dict[str, int]] = [{}] * num_ranks
    dist.all_gather_object(written, own, group)
    missing = [
        [
            (sender, name, size)
            for sender, files in enumerate(written)
            for name, size in files.items()
            if not (folder / name).exists()
        ]
    ]
    dist.broadcast_object_list(missing, src=0, group=group)
    for sender, name, size in missing[0]:
        if rank == 0:
            _receive(folder / name, size, sender, group)
        elif rank == sender:
            _send(folder / name, size, group)
            (folder / name).unlink()


def _send(file: Path, size: int, group: dist.ProcessGroup) -> None:
    with file.open("rb") as stream:
        for start in range(0, size, SENT_BYTES):
            data = bytearray(stream.read(min(SENT_BYTES, size - start)))
            dist.send(torch.frombuffer(data, dtype=torch.uint8), dst=0, group=group)


def _receive(file: Path, size: int, sender: int, group: dist.ProcessGroup) -> None:
    with file.open("wb") as stream:
        for start in range(0, size, SENT_BYTES):
            data = torch.empty(min(SENT_BYTES, size - start), dtype=torch.uint8)
            dist.recv(data, src=sender, group=group)
            stream.write(data.numpy().data)
