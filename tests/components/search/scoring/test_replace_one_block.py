"""Replace-one-block scores against whole models with that block in place, run from the start one by one."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import Interrupted, StageContext, quiet_context
from components.core.text.packing import IGNORE, Batch
from components.search.child.child_model import assemble
from components.search.child.ffn_fusion import ChildLayer
from components.search.config import MEASURES, TextMeasure
from components.search.scoring import replace_one_block as scoring
from components.search.scoring.replace_one_block import Replacements, Scores, score_replacements
from components.search.space.layer_space import Part, Size, Variant
from components.search.space.subblocks import BlockKey, Subblock, build_subblock, initialise, shape_of, subblock_weights

SIZES: dict[Part, tuple[Size, ...]] = {"attention": (1, "linear", 0), "ffn": (16, "linear", 0)}
VARIANTS: list[BlockKey] = [
    (layer, Variant(part, size)) for layer in range(4) for part, sizes in SIZES.items() for size in sizes
]


@pytest.fixture
def replacements(parent: TesseraForCausalLM) -> dict[BlockKey, Subblock | None]:
    return {(layer, variant): replacement_for(parent, layer, variant) for layer, variant in VARIANTS}


def replacement_for(parent: TesseraForCausalLM, layer: int, variant: Variant) -> Subblock | None:
    """An untrained variant."""
    if variant.size == 0:
        return None
    own = subblock_weights(parent.model.layers[layer].state_dict(), variant.part)
    weights = initialise(own, variant, importance_I=torch.arange(64.0), head_dim=32)
    return build_subblock(parent, layer, variant, weights)


def whole_child(parent: TesseraForCausalLM, key: BlockKey, replacement: Subblock | None) -> TesseraForCausalLM:
    """A model of its own with one sub-block replaced."""
    replaced, variant = key
    layers = []
    for layer, ((heads, width), block) in enumerate(zip(shape_of(parent.config), parent.model.layers, strict=True)):
        weights = dict(block.state_dict())
        if layer == replaced:
            weights = {n: t for n, t in weights.items() if n not in subblock_weights(weights, variant.part)}
            weights |= replacement.weights() if replacement else {}
            heads, width = (variant.size, width) if variant.part == "attention" else (heads, variant.size)
        layers.append(ChildLayer(heads, width, partial(dict, weights), (layer,)))
    return assemble(parent, layers)


@torch.no_grad()
def plainly(parent: TesseraForCausalLM, child: TesseraForCausalLM, batches: list[Batch]) -> dict[str, float]:
    """The measures by their formulas, from the logits of whole models."""
    found: dict[str, list[torch.Tensor]] = {measure: [] for measure in MEASURES}
    for batch in batches:
        mask_BT = batch.labels_BT != IGNORE
        inputs = {"position_ids": batch.position_ids_BT, "segment_ids": batch.segment_ids_BT}
        p, q = (functional.log_softmax(m(batch.input_ids_BT, **inputs).logits[mask_BT], -1) for m in (parent, child))
        h, g = (m.model(batch.input_ids_BT, **inputs).last_hidden_state[mask_BT] for m in (parent, child))
        labels = batch.labels_BT[mask_BT]
        found["kl"].append((p.exp() * (p - q)).sum(-1))
        found["lm_loss"].append(
            functional.nll_loss(q, labels, reduction="none") - functional.nll_loss(p, labels, reduction="none")
        )
        found["cosine"].append(1 - (h * g).sum(-1) / h.norm(dim=-1) / g.norm(dim=-1))
        found["top1"].append((p.argmax(-1) != q.argmax(-1)).float())
    return {measure: float(torch.cat(values).mean()) for measure, values in found.items()}


def means(scores: Scores, key: BlockKey) -> dict[str, float]:
    """Mean of each measure over all positions."""
    return dict(zip(MEASURES, (scores.sums[key].sum(0) / scores.tokens_R.sum()).tolist(), strict=True))


def test_scores_are_those_of_whole_models(
    parent: TesseraForCausalLM, replacements: Replacements, batches: list[Batch], context: StageContext
) -> None:
    scores = score_replacements(parent, replacements, batches, MEASURES, context)
    for key, replacement in replacements.items():
        expected = plainly(parent, whole_child(parent, key, replacement), batches)
        assert expected["kl"] > 1e-3
        assert means(scores, key) == pytest.approx(expected, abs=1e-5), key


@pytest.mark.parametrize("setting", ["TOKENS_IN_FLIGHT", "CHUNK_TOKENS", "MAX_BYTES_IN_FLIGHT", "CHUNK_BYTES"])
def test_work_in_small_pieces_gives_the_same(
    parent: TesseraForCausalLM,
    replacements: Replacements,
    batches: list[Batch],
    context: StageContext,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
) -> None:
    whole = score_replacements(parent, replacements, batches, MEASURES, context)
    monkeypatch.setattr(scoring, setting, 4 * 128 * 32 * 6 * 4 if setting == "MAX_BYTES_IN_FLIGHT" else 1)
    pieces = score_replacements(parent, replacements, batches, MEASURES, context)
    assert torch.equal(pieces.tokens_R, whole.tokens_R)
    for key in replacements:
        torch.testing.assert_close(pieces.sums[key], whole.sums[key], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_measure_alone_has_the_bits_that_it_has_beside_the_others(
    parent: TesseraForCausalLM,
    replacements: Replacements,
    batches: list[Batch],
    context: StageContext,
    measure: TextMeasure,
) -> None:
    every = score_replacements(parent, replacements, batches, MEASURES, context)
    alone = score_replacements(parent, replacements, batches, [measure], context)
    assert alone.measures == (measure,)
    for key in replacements:
        assert torch.equal(alone.sums[key][:, 0], every.sums[key][:, MEASURES.index(measure)])


def test_a_cosine_needs_no_logits(
    parent: TesseraForCausalLM, replacements: Replacements, batches: list[Batch], context: StageContext
) -> None:
    heads = []
    with parent.lm_head.register_forward_hook(lambda *_: heads.append(1)):
        score_replacements(parent, replacements, batches, ["cosine"], context)
        assert heads == []
        score_replacements(parent, replacements, batches, ["kl"], context)
        assert len(heads) > len(replacements)


def test_the_parents_own_block_scores_zero(
    parent: TesseraForCausalLM, batches: list[Batch], context: StageContext
) -> None:
    key = 1, Variant("ffn", 64)
    scores = score_replacements(parent, {key: Subblock.of(parent.model.layers[1], "ffn")}, batches, MEASURES, context)
    assert means(scores, key) == pytest.approx(dict.fromkeys(MEASURES, 0), abs=1e-6)


def test_scoring_takes_less_than_a_forward_pass_a_variant(
    parent: TesseraForCausalLM, replacements: Replacements, batches: list[Batch], context: StageContext
) -> None:
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as spent:
            score_replacements(parent, replacements, batches[:1], MEASURES, context)
        with FlopCounterMode(display=False) as naive, torch.no_grad():
            for key, replacement in replacements.items():
                child = whole_child(parent, key, replacement)
                child(batches[0].input_ids_BT, segment_ids=batches[0].segment_ids_BT)
    assert 0.3 < spent.get_total_flops() / naive.get_total_flops() < 0.6


def test_an_interrupted_scoring_goes_on_to_the_same_bits(
    parent: TesseraForCausalLM,
    replacements: Replacements,
    batches: list[Batch],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scoring, "TOKENS_IN_FLIGHT", 1)
    whole = score_replacements(parent, replacements, batches, MEASURES, quiet_context(tmp_path / "a"))
    context = quiet_context(tmp_path / "b")
    asked = iter([False, False, True])
    context.stopping = lambda: next(asked, True)
    with pytest.raises(Interrupted):
        score_replacements(parent, replacements, batches, MEASURES, context)
    context.stopping = lambda: False
    resumed = score_replacements(parent, replacements, batches, MEASURES, context)
    assert torch.equal(resumed.tokens_R, whole.tokens_R)
    assert all(torch.equal(resumed.sums[key], whole.sums[key]) for key in replacements)


def test_a_parent_read_layer_by_layer_scores_the_same(
    parent: TesseraForCausalLM,
    replacements: Replacements,
    parent_folder: Path,
    batches: list[Batch],
    context: StageContext,
) -> None:
    paged = load_model(parent_folder, paged=True)
    whole = score_replacements(parent, replacements, batches, MEASURES, context)
    pieces = score_replacements(paged, replacements, batches, MEASURES, context)
    for key in replacements:
        torch.testing.assert_close(pieces.sums[key], whole.sums[key], atol=1e-4, rtol=1e-4)
