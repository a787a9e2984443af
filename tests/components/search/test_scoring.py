"""Replace-one-block KL against a whole model with that block in place, run from the start."""

import pytest
import torch
from torch.nn import functional

from components.core.batches import IGNORE, Batch
from components.core.job import Job
from components.core.model import TesseraForCausalLM
from components.search.assemble import assemble, build_subblock, shape_of
from components.search.fusion import ChildLayer
from components.search.scoring import replacement_kl
from components.search.space import PARTS, Size, Variant
from components.search.subblock import Subblock
from components.search.variants import initialise, subblock_weights

SIZES: tuple[Size, ...] = (1, "linear", 0)


def whole_model_kl(parent: TesseraForCausalLM, child: TesseraForCausalLM, batches: list[Batch]) -> float:
    """KL(parent || child) from logits, the plain formula over counted positions."""
    total, count = 0.0, 0
    for batch in batches:
        mask_BT = batch.labels_BT != IGNORE
        inputs = {"position_ids": batch.position_ids_BT, "segment_ids": batch.segment_ids_BT}
        with torch.no_grad():
            p, q = (
                functional.log_softmax(m(batch.input_ids_BT, **inputs).logits[mask_BT], -1) for m in (parent, child)
            )
        total += float((p.exp() * (p - q)).sum())
        count += int(mask_BT.sum())
    return total / count


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize(
    "variant",
    [*(Variant(part, size) for part in PARTS for size in SIZES), Variant("ffn", 16)],
)
def test_score_is_the_kl_of_the_whole_model(
    parent: TesseraForCausalLM, batches: list[Batch], job: Job, layer: int, variant: Variant
) -> None:
    layers = [
        ChildLayer(heads, width, dict(block.state_dict()), (number,))
        for number, ((heads, width), block) in enumerate(zip(shape_of(parent.config), parent.model.layers, strict=True))
    ]
    replacement = replacement_for(parent, layer, variant)
    others = {
        n: t for n, t in layers[layer].weights.items() if n not in subblock_weights(layers[layer].weights, variant.part)
    }
    layers[layer] = ChildLayer(
        variant.size if variant.part == "attention" else 4,
        variant.size if variant.part == "ffn" else 64,
        others | (replacement.weights() if replacement else {}),
        (layer,),
    )
    expected = whole_model_kl(parent, assemble(parent, layers), batches)
    scores = replacement_kl(parent, {(layer, variant): replacement}, batches, job)
    assert expected > 1e-3
    assert scores[layer, variant] == pytest.approx(expected, abs=1e-5)


def test_the_parents_own_block_scores_zero(parent: TesseraForCausalLM, batches: list[Batch], job: Job) -> None:
    own = Subblock.of(parent.model.layers[1], "ffn")
    scores = replacement_kl(parent, {(1, Variant("ffn", 64)): own}, batches, job)
    assert scores[1, Variant("ffn", 64)] == pytest.approx(0, abs=1e-9)


def replacement_for(parent: TesseraForCausalLM, layer: int, variant: Variant) -> Subblock | None:
    """An untrained variant."""
    if variant.size == 0:
        return None
    own = subblock_weights(parent.model.layers[layer].state_dict(), variant.part)
    weights = initialise(own, variant, importance_I=torch.arange(64.0), head_dim=32)
    return build_subblock(parent, layer, variant, weights)
