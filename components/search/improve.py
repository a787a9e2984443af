"""A good choice from a near one: pairs of changes, always the pair that helps most.

Shape letters: K slots, J options of a slot (padded), R limited costs, M single changes.
"""

import numpy as np

from components.search.problem import Choice, Floats
from components.search.relaxation import Scaled

NUM_CHANGES = 100
"""Options that are tried, those of least reduced cost."""
EXCESS_PRICE = 1e4
"""What exceeding limits counts beside scores, both scaled to 1."""
MAX_ROUNDS = 60
"""Pairs of changes at most."""


def improve(scaled: Scaled, reduced_KJ: Floats, start: Choice) -> Choice:
    """Change options two at a time, first until the limits hold, then to score less.

    Args:
        scaled: the problem.
        reduced_KJ: reduced costs, infinite where an option is not allowed.
        start: any choice.

    Returns:
        A choice that no such pair improves; it may still exceed limits.
    """
    num_options = reduced_KJ.shape[1]
    tried = np.argsort(reduced_KJ, axis=None, kind="stable")[: len(reduced_KJ) + NUM_CHANGES]
    slots_M, options_M = np.divmod(tried[np.isfinite(reduced_KJ.ravel()[tried])], num_options)
    same_slot_MM = slots_M[:, None] == slots_M
    np.fill_diagonal(same_slot_MM, False)  # a change paired with itself stands for that change alone
    alone_M = np.eye(len(slots_M), dtype=bool)
    choice_K = np.array(start)
    rows_K = np.arange(len(choice_K))
    for _ in range(MAX_ROUNDS):
        scores_K = scaled.scores_KJ[rows_K, choice_K]
        costs_KR = scaled.costs_KJR[rows_K, choice_K]
        over_R = costs_KR.sum(axis=0) - scaled.rooms_R
        score_M = scaled.scores_KJ[slots_M, options_M] - scores_K[slots_M]
        cost_MR = scaled.costs_KJR[slots_M, options_M] - costs_KR[slots_M]
        value_MM = score_M[:, None] + np.where(alone_M, 0.0, score_M)
        for over, cost_M in zip(over_R, cost_MR.T, strict=True):
            value_MM += EXCESS_PRICE * np.maximum(0.0, over + cost_M[:, None] + np.where(alone_M, 0.0, cost_M))
        value_MM[same_slot_MM] = np.inf
        first, second = np.unravel_index(value_MM.argmin(), value_MM.shape)
        now = EXCESS_PRICE * np.maximum(0.0, over_R).sum()
        if not value_MM[first, second] < now - 1e-12:
            break
        choice_K[slots_M[[first, second]]] = options_M[[first, second]]
    return tuple(choice_K.tolist())
