"""How much each FFN of an attention-free run depends on those before it: what fusing them would ignore.

Shape letters: B rows, T tokens, N tokens that are no padding, D hidden size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.packing import Batch
from components.search.child.ffn_fusion import ChildLayer, split_runs
from components.search.library.activations import observe
from components.search.space.subblock import Subblock


@torch.no_grad()
def ffn_dependencies(
    child: TesseraForCausalLM, layers: Sequence[ChildLayer], batches: Sequence[Batch]
) -> dict[tuple[int, int], float]:
    """Cosine distance between what an FFN adds and what it adds with an earlier FFN of its run removed.

    The residual streams that each lack one FFN go through the run side by side, so that a layer is needed once.

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
            without: dict[int, Tensor] = {}
            for number in run:
                block = Subblock.of(child.model.layers[places[number]], "ffn")
                assert block is not None, "a run has FFNs only"
                lesson = seen[places[number], "ffn"]
                whole_ND = lesson.output_BTD[mask_BT]
                for removed, hidden_ND in without.items():
                    added_ND = block(hidden_ND, ())
                    distance_N = 1 - F.cosine_similarity(added_ND, whole_ND, dim=-1)
                    sums[removed, number] = sums.get((removed, number), 0.0) + float(distance_N.sum())
                    without[removed] = hidden_ND + added_ND
                without[number] = lesson.hidden_BTD[mask_BT]
    return {pair: max(0.0, total / tokens) for pair, total in sums.items()}
