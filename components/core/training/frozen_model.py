"""A model that only computes: whole in memory, or a layer at a time where it is too large for its device."""

from pathlib import Path

import torch

from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.weight_index import weight_files
from components.core.runtime.context import StageContext
from components.core.runtime.devices import device_of, memory_bytes
from components.core.training.step_memory import PAGED_SHARE


def load_frozen(
    folder: Path,
    context: StageContext,
    *,
    what: str,
    computes_in: torch.dtype,
    device: torch.device | None = None,
    processes: int = 1,
) -> TesseraForCausalLM:
    """Load a model without gradients: weights in the precision of its files.

    It is paged if it would take too much memory: of its GPU, or on a CPU of what the placement asks for.

    Args:
        folder: the model folder; it must stay, as a paged model reads it.
        context: has the placement, sets the threads, and takes a note where the model is paged.
        what: the model, for the note.
        computes_in: precision of activations and arithmetic.
        device: where the model computes; None: on the device of the placement.
        processes: of the stage, each of which has a model in the memory of a node.
    """
    torch.set_num_threads(context.placement.threads)
    device = device or device_of(context.placement)
    needed = sum(file.stat().st_size for file in weight_files(folder))
    have = memory_bytes(device, context.placement.model_copy(update={"processes": processes}))
    paged = needed > PAGED_SHARE * have
    if paged:
        where = "memory_gib leaves" if device.type == "cpu" else "its GPU has"
        context.note(
            f"{what} takes {needed / 2**30:.3g} GiB, more than {PAGED_SHARE:.0%} of the {have / 2**30:.3g} GiB that "
            f"{where}: its layers are read one at a time"
        )
    model = load_model(folder, dtype=None, computes_in=computes_in, device=device, paged=paged)
    model.requires_grad_(False)
    return model
