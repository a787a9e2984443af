"""How much each FFN of an attention-free run depends on those before it: what fusing them would ignore.

Shape letters: B rows, T tokens, N tokens that are no padding, D hidden size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from components.core.batches import Batch
from components.core.model import TesseraForCausalLM
from components.search.fusion import ChildLayer, split_runs
from components.search.subblock import Subblock
from components.search.watch import observe


@torch.no_grad()
def ffn_dependencies(
    child: TesseraForCausalLM, layers: Sequence[ChildLayer], batches: Sequence[Batch]
) -> dict[tuple[int, int], float]:
    """Cosine distance between what an FFN adds and what it adds with an earlier FFN of its run removed.

    Args:
        child: made of these layers.
        layers: none of them empty, nothing fused.
        batches: text.

    Returns:
        By two of the parent's layers, in order: 0 where the second does not notice that the first is gone; 2 at most.

    Source: arXiv 2503.18908, section 4.
    """
    places = {layer.parent_layers[0]: place for place, layer in enumerate(layers)}
    runs = [[layer.parent_layers[0] for layer in run] for run in split_runs(layers) if len(run) > 1]
    sums: dict[tuple[int, int], float] = {}
    tokens = 0
    for batch in batches if runs else ():
        seen, _ = observe(child, batch, [places[number] for run in runs for number in run])
        mask_BT = batch.segment_ids_BT > 0
        tokens += int(mask_BT.sum())
        for run in runs:
            lessons = [seen[places[number], "ffn"] for number in run]
            blocks = [Subblock.of(child.model.layers[places[number]], "ffn") for number in run]
            inputs = [lesson.hidden_BTD[mask_BT] for lesson in lessons]
            outputs = [lesson.output_BTD[mask_BT] for lesson in lessons]
            for removed, number in enumerate(run[:-1]):
                distances = _without(removed, blocks, inputs, outputs)
                for later, distance in zip(run[removed + 1 :], distances, strict=True):
                    sums[number, later] = sums.get((number, later), 0.0) + distance
    return {pair: max(0.0, total / tokens) for pair, total in sums.items()}


def _without(
    removed: int, blocks: Sequence[Subblock | None], inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> list[float]:
    """Distances, summed over tokens, of what each later FFN adds with and without an earlier one."""
    hidden_ND = inputs[removed]
    distances = []
    for block, whole_ND in zip(blocks[removed + 1 :], outputs[removed + 1 :], strict=True):
        assert block is not None, "a run has FFNs only"
        added_ND = block(hidden_ND, ())
        distances.append(float((1 - F.cosine_similarity(added_ND, whole_ND, dim=-1)).sum()))
        hidden_ND = hidden_ND + added_ND
    return distances
