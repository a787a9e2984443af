"""How well scores are known, and whether a choice between sub-blocks lies within that.

Held-out text is sampled row by row: positions of one row are not independent of each other, rows are. All variants are
scored on the same rows, so that the error of a difference is taken from the differences row by row.

Shape letters: R rows, K slots, J options.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from components.search.config import Measure
from components.search.scoring.records import ShardScores
from components.search.scoring.uncertainty import Rows, standard_error
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Choice
from components.search.solver.records import Margin
from components.search.solver.solve import solve_problem

NOISE = 2.0
"""Standard errors that a difference must exceed to count as one: about 95 % of chance differences do not."""
NODES = 1000
"""Nodes that the search for a next best child may take; beyond, the best one found counts."""


def margins(
    table: OptionTable, limits: Mapping[str, float], choice: Choice, shards: Sequence[ShardScores], measure: Measure
) -> tuple[Margin, ...]:
    """For each slot, how much worse the best child with another option there is, and how well that is known.

    Args:
        table: options of all slots.
        limits: absolute limits.
        choice: the best one within them.
        shards: what scores were made from.
        measure: what the scores of the table are.
    """
    problem = table.problem(table.scores, limits).with_fixed(table.fixed_options)
    sums, tokens_R = _row_sums(table, shards, measure)
    found = []
    for number, slot in enumerate(table.slots):
        others_KJ = problem.allowed_KJ.copy()
        others_KJ[number, choice[number]] = False
        margin = Margin(layer=slot.layer, part=slot.part, chosen=slot.options[choice[number]].name)
        if others_KJ[number].any():
            other = solve_problem(dataclasses.replace(problem, allowed_KJ=others_KJ), max_nodes=NODES)
            if other is not None:
                difference = float(problem.objective(other.choice) - problem.objective(choice))
                differences_R = sum(
                    (sums[k][b] - sums[k][a] for k, (a, b) in enumerate(zip(choice, other.choice, strict=True))),
                    start=np.zeros_like(tokens_R),
                )
                error = standard_error(differences_R, tokens_R)
                margin = margin.model_copy(
                    update={
                        "following": slot.options[other.choice[number]].name,
                        "difference": difference,
                        "error": error,
                        "within_noise": None if error is None else difference < NOISE * error,
                    }
                )
        found.append(margin)
    return tuple(found)


def _row_sums(table: OptionTable, shards: Sequence[ShardScores], measure: Measure) -> tuple[list[list[Rows]], Rows]:
    """Of each option of each slot, the sums over the rows that all variants were scored on; and the tokens of those."""
    blocks = [block for shard in shards for block in shard.blocks]
    rows = min((len(block.row_sums.get(measure, ())) for block in blocks), default=0)
    known = {(block.layer, block.part, block.size): np.array(block.row_sums[measure][:rows]) for block in blocks}
    nothing = np.zeros(rows)
    sums = [
        [known.get((slot.layer, slot.part, option.size), nothing) for option in slot.options] for slot in table.slots
    ]
    # A problem counts once, a row of text by its tokens.
    tokens = [1] * rows if measure == "accuracy" else shards[0].row_tokens[:rows] if shards else ()
    return sums, np.array(tokens, dtype=np.float64)
