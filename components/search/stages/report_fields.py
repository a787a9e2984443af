"""What the search tells of itself beside the children: fronts, spread of importance, training of pairs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from components.search.library.importance import share_of_top
from components.search.library.records import CoupledPair, LayerImportance
from components.search.solver.option_table import OptionTable
from components.search.solver.records import FrontPoint, ParetoPoint
from components.search.solver.solve import pareto_front
from components.search.space.layer_space import Variant

FRONTS = ("parameters", "memory_bytes", "request_ms")
"""Resources besides latency that the best score is told over."""


def latency_front(table: OptionTable, limits: Mapping[str, float], points: int) -> tuple[ParetoPoint, ...]:
    """The best score over the time of a decode step."""
    return tuple(
        ParetoPoint(limit_ms=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
        for limit, best in pareto_front(table, limits, points)
    )


def other_fronts(table: OptionTable, limits: Mapping[str, float], points: int) -> dict[str, tuple[FrontPoint, ...]]:
    """The best score over each resource besides latency that the costs know."""
    parent = table.costs(table.parent_choice)
    return {
        resource: tuple(
            FrontPoint(limit=limit, choice=best.choice, score=best.objective, costs=table.costs(best.choice))
            for limit, best in pareto_front(table, limits, points, resource)
        )
        for resource in FRONTS
        if parent.of(resource)
    }


def coupled_pairs(
    pairs: Mapping[int, tuple[Variant, Variant]], errors: Mapping[int, Sequence[float]]
) -> tuple[CoupledPair, ...]:
    """What training the child's pairs came to."""
    return tuple(
        CoupledPair(
            layer=layer,
            attention=pairs[layer][0].name,
            ffn=pairs[layer][1].name,
            first_error=history[0],
            last_error=history[-1],
        )
        for layer, history in errors.items()
    )


def spread_of_importance(contributions: Mapping[int, Tensor]) -> tuple[LayerImportance, ...]:
    """How contribution spreads over the channels of each layer."""
    return tuple(
        LayerImportance(layer=layer, mean=float(values_I.mean()), top_half_share=share_of_top(values_I, 0.5))
        for layer, values_I in sorted(contributions.items())
    )
