"""Variants that need not be scored to the end, because whatever they would score, a best choice can do without them.

Let a and b be variants of one slot, where a costs no more than b of anything that is limited, and scores no more. In
any choice that has b, put a in its place: no sum of costs grows, so that the choice stays within all limits, and the
sum of scores does not grow. So there is a best choice without b.

The KL of a position is never negative, so that the sum over the text seen so far is not above the sum over all text.
Once the first, for b, is above the second, for a, the score of b is above that of a, and b can be dropped. What is then
written as its score is the mean that it has at least; it is above a's too, so that the solver, which goes by what is
written, does not choose b either. The parent's own sub-block scores 0: what costs no less than that is dropped at once.

This holds for the best choice under limits on sums of costs. It does not for pools of several choices, for choices kept
away from earlier ones, or where a slot is told to hold b.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.packing import Batch
from components.search.config import MEASURES
from components.search.scoring.replace_one_block import Replacements, Scores, score_replacements
from components.search.space.library_files import BlockKey

VariantCosts = Mapping[BlockKey, Sequence[float]]


def score_undominated(
    parent: TesseraForCausalLM,
    replacements: Replacements,
    batches: Sequence[Batch],
    context: StageContext,
    *,
    costs: VariantCosts,
    needed: Collection[BlockKey] = (),
) -> Scores:
    """Score variants, and drop those that a best choice can do without.

    First, on all text, the variants that nothing costs less than; then the others, each until it is above one of those.

    Args:
        parent: frozen.
        replacements: all variants.
        batches: held-out text.
        context: takes progress, keeps resume points, says when to stop.
        costs: everything that may be limited, of the variants and of the parent's own sub-blocks.
        needed: variants that are scored to the end in any case: where a slot is told to hold them.
    """
    cheapest = [key for key in replacements if not _cheaper(key, costs)]
    scores = score_replacements(parent, {key: replacements[key] for key in cheapest}, batches, context)
    kl = MEASURES.index("kl")
    totals = {key: float(sums_RM[:, kl].sum()) for key, sums_RM in scores.sums.items()}
    # The parent's own sub-blocks change nothing: they score 0.
    totals |= {key: 0.0 for key in costs if key not in replacements}
    ceilings: dict[BlockKey, float] = defaultdict(lambda: float("inf"))
    for key in replacements:
        for other, total in totals.items():
            if key not in needed and other != key and _same_slot(other, key) and _all_at_most(costs[other], costs[key]):
                ceilings[key] = min(ceilings[key], total)
    others = {key: block for key, block in replacements.items() if key not in cheapest}
    rest = score_replacements(parent, others, batches, context, ceilings=ceilings)
    scores.sums = {key: (scores.sums | rest.sums)[key] for key in replacements}
    scores.flops.spent += rest.flops.spent
    scores.flops.naive += rest.flops.naive
    scores.seconds += rest.seconds
    return scores


def _cheaper(key: BlockKey, costs: VariantCosts) -> bool:
    """Whether another variant of the slot costs no more of anything, and less of something."""
    return any(
        _same_slot(other, key) and _all_at_most(theirs, costs[key]) and tuple(theirs) != tuple(costs[key])
        for other, theirs in costs.items()
    )


def _same_slot(a: BlockKey, b: BlockKey) -> bool:
    return (a[0], a[1].part) == (b[0], b[1].part)


def _all_at_most(some: Sequence[float], others: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(some, others, strict=True))
