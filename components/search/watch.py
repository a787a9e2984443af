"""What the parent's sub-blocks saw and made in one forward pass: the data that variants are trained and scored on.

Shape letters: B rows, T tokens, D hidden size.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from components.core.batches import Batch
from components.core.model import TesseraForCausalLM
from components.search.space import PARTS, Part
from components.search.subblock import Subblock


@dataclass
class Seen:
    """One sub-block of the parent in one forward pass.

    Attributes:
        hidden_BTD: what entered it, before its norm.
        context: what its module is given beside hidden states: positions and mask.
        output_BTD: what its module made, before the residual is added.
    """

    hidden_BTD: Tensor = field(default_factory=lambda: torch.empty(0))
    context: tuple[Any, ...] = ()
    output_BTD: Tensor = field(default_factory=lambda: torch.empty(0))


@torch.no_grad()
def observe(
    parent: TesseraForCausalLM, batch: Batch, layers: Iterable[int]
) -> tuple[dict[tuple[int, Part], Seen], Tensor]:
    """Run the parent once.

    Returns:
        What each sub-block of these layers saw and made (no-ops have nothing), and hidden states after the final norm.
    """
    seen: dict[tuple[int, Part], Seen] = {}
    with ExitStack() as hooks:
        for layer in layers:
            for part in PARTS:
                own = Subblock.of(parent.model.layers[layer], part)
                if own is not None:
                    seen[layer, part] = hooks.enter_context(_watching(own))
        output = parent.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    return seen, output.last_hidden_state


@contextmanager
def _watching(own: Subblock) -> Iterator[Seen]:
    """Record what goes through a sub-block while in scope."""
    seen = Seen()

    def before_norm(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.hidden_BTD = args[0]

    def after_module(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        seen.context, seen.output_BTD = args[1:], output

    with (
        own.norm.register_forward_pre_hook(before_norm),
        own.module.register_forward_hook(after_module),
    ):
        yield seen
