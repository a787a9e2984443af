"""What the parent's sub-blocks saw and made in one forward pass: the data that variants are trained and scored on.

Shape letters: N batches, B rows, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from components.core.model.decoder import TesseraForCausalLM, segment_mask
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch
from components.search.space.layer_space import PARTS, Part
from components.search.space.subblock import Subblock


@dataclass
class SubblockIO:
    """One sub-block of the parent in one forward pass.

    Attributes:
        hidden_BTD: what entered it, before its norm.
        context: what its module is given beside hidden states: positions and mask.
        output_BTD: what its module made, before the residual is added.
    """

    hidden_BTD: Tensor = field(default_factory=lambda: torch.empty(0))
    context: tuple[Any, ...] = ()
    output_BTD: Tensor = field(default_factory=lambda: torch.empty(0))


HELD_BYTES = 1 << 30
"""Hidden states of all batches of a walk that are held in memory; more are in a file."""


@torch.no_grad()
def iterate_layers(
    parent: TesseraForCausalLM, batches: Sequence[Batch], num_layers: int, context: StageContext
) -> Iterator[tuple[int, int, dict[Part, SubblockIO]]]:
    """Take batches through the first layers of the parent together, so that each layer is needed once.

    Only what stands between two layers is kept, and of a batch only until it has gone through the next.

    Yields:
        Number of the layer, number of the batch, and what each sub-block saw and made (a no-op nothing).
    """
    first_BTD = parent.model.embed_tokens(batches[0].input_ids_BT)
    states_NBTD = _room(len(batches), first_BTD, context)
    for number, batch in enumerate(batches):
        states_NBTD[number] = parent.model.embed_tokens(batch.input_ids_BT)
    for layer, module in enumerate(islice(parent.model.layers, num_layers)):
        blocks = {part: block for part in PARTS if (block := Subblock.of(module, part)) is not None}
        for number, batch in enumerate(batches):
            seen: dict[Part, SubblockIO] = {}
            hidden_BTD = states_NBTD[number]
            for part, block in blocks.items():
                given = attention_context(parent, hidden_BTD, batch) if part == "attention" else ()
                seen[part] = SubblockIO(hidden_BTD, given, block(hidden_BTD, given))
                hidden_BTD = hidden_BTD + seen[part].output_BTD
            yield layer, number, seen
            states_NBTD[number] = hidden_BTD


def attention_context(parent: TesseraForCausalLM, hidden_BTD: Tensor, batch: Batch) -> tuple[Any, ...]:
    """What an attention is given beside hidden states: rotary positions, mask, no cache."""
    return parent.model.rotary_emb(hidden_BTD, batch.position_ids_BT), segment_mask(batch.segment_ids_BT), None


def _room(count: int, like: Tensor, context: StageContext) -> Tensor:
    """Room for so many tensors, in memory or in a file of the job's."""
    whole = torch.Size((count, *like.shape))
    if whole.numel() * like.element_size() <= HELD_BYTES:
        return torch.empty(whole, dtype=like.dtype)
    file = str(context.scratch / "hidden-states")
    return torch.from_file(file, shared=True, size=whole.numel(), dtype=like.dtype).view(whole)


@torch.no_grad()
def observe(
    parent: TesseraForCausalLM, batch: Batch, layers: Iterable[int]
) -> tuple[dict[tuple[int, Part], SubblockIO], Tensor]:
    """Run the parent once.

    Returns:
        What each sub-block of these layers saw and made (no-ops have nothing), and hidden states after the final norm.
    """
    seen: dict[tuple[int, Part], SubblockIO] = {}
    with ExitStack() as hooks:
        for layer in layers:
            for part in PARTS:
                own = Subblock.of(parent.model.layers[layer], part)
                if own is not None:
                    seen[layer, part] = hooks.enter_context(_watching(own))
        output = parent.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    return seen, output.last_hidden_state


@contextmanager
def _watching(own: Subblock) -> Iterator[SubblockIO]:
    """Record what goes through a sub-block while in scope."""
    seen = SubblockIO()

    def before_norm(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.hidden_BTD = args[0]

    def after_module(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.context, seen.output_BTD = args[1:], output

    with (
        own.norm.register_forward_pre_hook(before_norm),
        own.module.register_forward_hook(after_module),
    ):
        yield seen
