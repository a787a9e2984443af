"""Replace-one-block scores: how far the parent's predictions move when a single sub-block is swapped.

Shape letters: B rows, T tokens, D hidden size, N positions that count.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from components.core.batches import Batch
from components.core.job import Job
from components.core.losses import counted, kl_sum
from components.core.model import TesseraForCausalLM
from components.search.blocks import BlockKey
from components.search.space import Part
from components.search.subblock import Subblock
from components.search.watch import Seen, observe


@torch.no_grad()
def replacement_kl(
    parent: TesseraForCausalLM,
    replacements: Mapping[BlockKey, Subblock | None],
    batches: Sequence[Batch],
    job: Job,
) -> dict[BlockKey, float]:
    """KL(parent || parent with one sub-block replaced), averaged over the counted positions of held-out text.

    What comes before the replaced sub-block is the parent's: it is computed once a batch, and only the rest again.

    Args:
        parent: frozen.
        replacements: what to put in place of the parent's sub-block of that layer and part; None is the no-op.
        batches: held-out text.
        job: takes progress.

    Returns:
        Nats a token, never below 0.

    Source: arXiv 2411.19146, section 4.2.
    """
    sums = dict.fromkeys(replacements, 0.0)
    tokens = 0
    for done, batch in enumerate(batches, 1):
        seen, parent_BTD = observe(parent, batch, range(len(parent.model.layers)))
        parent_ND, labels_N = counted(parent_BTD, batch.labels_BT)
        for (layer, variant), replacement in replacements.items():
            child_BTD = _finish(parent, seen, layer, variant.part, replacement)
            child_ND, _ = counted(child_BTD, batch.labels_BT)
            sums[layer, variant] += float(kl_sum(child_ND, parent_ND, parent.lm_head, parent.lm_head))
        tokens += labels_N.numel()
        job.progress(done, len(batches), "replace-one-block scores")
    return {key: max(0.0, total / tokens) for key, total in sums.items()}


def _finish(
    parent: TesseraForCausalLM,
    seen: Mapping[tuple[int, Part], Seen],
    layer: int,
    part: Part,
    replacement: Subblock | None,
) -> Tensor:
    """Hidden states (B, T, D) after the final norm, with one sub-block replaced; the parent's from there on."""
    order = list(seen)
    here = order.index((layer, part))
    hidden_BTD = seen[layer, part].hidden_BTD
    rest = [(seen[key].context, Subblock.of(parent.model.layers[key[0]], key[1])) for key in order[here + 1 :]]
    for context, block in [(seen[layer, part].context, replacement), *rest]:
        if block is not None:
            hidden_BTD = hidden_BTD + block(hidden_BTD, context)
    normed: Tensor = parent.model.norm(hidden_BTD)
    return normed
