"""The parent on calibration text: how it is loaded, its packed batches, inputs and outputs of its sub-blocks.

Shape letters: N batches, B rows, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from components.core.model.attention import packed_mask
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch, load_batches
from components.core.training.frozen_model import load_frozen
from components.search.config import Calibration
from components.search.space.layer_space import PARTS, Part
from components.search.space.subblocks import Subblock


def load_parent(
    folder: Path, context: StageContext, dtype: str = "float32", device: torch.device | None = None
) -> TesseraForCausalLM:
    """Load the parent, frozen: weights in the precision of its files, computation in `dtype`.

    It is paged if it would take too much of the memory of its device.

    Args:
        folder: the model folder.
        context: has the placement, and takes a note where the parent is paged.
        dtype: precision of activations and arithmetic.
        device: where the parent computes; None: on the device of the placement.
    """
    return load_frozen(folder, context, what="the parent", computes_in=getattr(torch, dtype), device=device)


def calibration_batches(
    config: Calibration, corpus: Path, parent: Path, split: str, limit: int, context: StageContext
) -> list[Batch]:
    """At most `limit` packed batches of one split of the corpus; a note says where it has not enough rows for them.

    Raises:
        DataError: the split is empty, or has no token to learn from.
    """
    size = config.batch_size
    batches = load_batches(
        corpus, parent, split, seq_len=config.seq_len, batch_size=size, limit=limit, seed=config.seed or 0
    )
    num_rows = sum(len(batch.input_ids_BT) for batch in batches)
    if num_rows < limit * size:
        context.note(
            f"the {split} split has {num_rows} packed rows of {config.seq_len} tokens: they are {len(batches)} batches "
            f"of at most {size} rows, where {limit} full batches were asked for"
        )
    return batches


@dataclass
class SubblockIO:
    """One sub-block of the parent in one forward pass.

    Attributes:
        hidden_BTD: its input, before the norm.
        context: the other arguments of its module: positions and mask.
        output_BTD: output of its module, before the residual is added.
    """

    hidden_BTD: Tensor = field(default_factory=lambda: torch.empty(0))
    context: tuple[Any, ...] = ()
    output_BTD: Tensor = field(default_factory=lambda: torch.empty(0))


MAX_BYTES_IN_MEMORY = 1 << 30
"""Hidden states of all batches up to this size are in memory; larger ones are in a file."""


@torch.no_grad()
def iterate_layers(
    parent: TesseraForCausalLM, batches: Sequence[Batch], num_layers: int, context: StageContext
) -> Iterator[tuple[int, int, dict[Part, SubblockIO]]]:
    """Take all batches through a layer before the next, so that each layer is needed once.

    Only the hidden states between two layers are stored. No batch may have more rows than the first.

    Yields:
        Number of the layer, number of the batch, and input and output of each sub-block (none of a no-op).
    """
    batches = [batch.to(parent.device) for batch in batches]
    first_BTD = parent.model.embed_tokens(batches[0].input_ids_BT)
    whole_NBTD = _storage(len(batches), first_BTD, context)
    states_BTD = [whole_NBTD[number, : len(batch.input_ids_BT)] for number, batch in enumerate(batches)]
    for state_BTD, batch in zip(states_BTD, batches, strict=True):
        state_BTD[:] = parent.model.embed_tokens(batch.input_ids_BT)
    for layer, module in enumerate(islice(parent.model.layers, num_layers)):
        blocks = {part: block for part in PARTS if (block := Subblock.of(module, part)) is not None}
        for number, batch in enumerate(batches):
            ios: dict[Part, SubblockIO] = {}
            hidden_BTD = states_BTD[number].to(parent.device)
            for part, block in blocks.items():
                arguments = attention_context(parent, hidden_BTD, batch) if part == "attention" else ()
                ios[part] = SubblockIO(hidden_BTD, arguments, block(hidden_BTD, arguments))
                hidden_BTD = hidden_BTD + ios[part].output_BTD
            yield layer, number, ios
            states_BTD[number][:] = hidden_BTD


def attention_context(parent: TesseraForCausalLM, hidden_BTD: Tensor, batch: Batch) -> tuple[Any, ...]:
    """Arguments of an attention after the hidden states: rotary positions, mask, no cache."""
    rotary = parent.model.rotary_emb(hidden_BTD, batch.position_ids_BT)
    return rotary, packed_mask(batch.segment_ids_BT, parent.config.head_dim), None


def _storage(count: int, like: Tensor, context: StageContext) -> Tensor:
    """Storage for so many tensors: on their device, or in a scratch file, which is in the memory of the CPU."""
    whole = torch.Size((count, *like.shape))
    if whole.numel() * like.element_size() <= MAX_BYTES_IN_MEMORY:
        return torch.empty(whole, dtype=like.dtype, device=like.device)
    file = str(context.scratch / "hidden-states")
    return torch.from_file(file, shared=True, size=whole.numel(), dtype=like.dtype).view(whole)


@torch.no_grad()
def observe(
    parent: TesseraForCausalLM, batch: Batch, layers: Iterable[int]
) -> tuple[dict[tuple[int, Part], SubblockIO], Tensor]:
    """Run the parent once.

    Returns:
        Input and output of each sub-block of these layers but no-ops, and hidden states after the final norm.
    """
    ios: dict[tuple[int, Part], SubblockIO] = {}
    batch = batch.to(parent.device)
    with ExitStack() as hooks:
        for layer in layers:
            for part in PARTS:
                own = Subblock.of(parent.model.layers[layer], part)
                if own is not None:
                    ios[layer, part] = hooks.enter_context(_recorded(own))
        output = parent.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    return ios, output.last_hidden_state


@contextmanager
def _recorded(own: Subblock) -> Iterator[SubblockIO]:
    """While in scope, hooks record input and output of a sub-block."""
    io = SubblockIO()

    def before_norm(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        io.hidden_BTD = args[0]

    def after_module(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        io.context, io.output_BTD = args[1:], output

    with (
        own.norm.register_forward_pre_hook(before_norm),
        own.module.register_forward_hook(after_module),
    ):
        yield io
