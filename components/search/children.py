"""A choice as a model: its layers, fused, between the parent's embeddings and head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from components.core.batches import Batch
from components.core.model import TesseraForCausalLM
from components.search.assemble import assemble
from components.search.config import Fusion
from components.search.dependency import ffn_dependencies
from components.search.fusion import ChildLayer, Dependencies, drop_empty, fuse_layers
from components.search.problem import Choice
from components.search.results import Picked
from components.search.solver import fits
from components.search.table import OptionTable


@dataclass(frozen=True)
class Child:
    """A child before and after fusion.

    Attributes:
        layers: one for each of the parent's.
        fused: the layers of the model as written.
        dependencies: of its FFNs on each other, where they were measured.
        unfused: a model of the layers that hold something.
        model: the model as written.
    """

    layers: list[ChildLayer]
    fused: list[ChildLayer]
    dependencies: Dependencies
    unfused: TesseraForCausalLM
    model: TesseraForCausalLM


def make_child(parent: TesseraForCausalLM, layers: list[ChildLayer], config: Fusion, batches: Sequence[Batch]) -> Child:
    """Fuse and assemble.

    Args:
        parent: has what no choice changes.
        layers: one for each of the parent's.
        config: what to fuse.
        batches: text that the dependency of FFNs is measured on; none where it is not needed.
    """
    left = drop_empty(layers)
    unfused = assemble(parent, left)
    dependencies = ffn_dependencies(unfused, left, batches)
    fused = fuse_layers(layers, config, dependencies)
    return Child(layers, fused, dependencies, unfused, assemble(parent, fused) if len(fused) != len(left) else unfused)


def picked(table: OptionTable, choice: Choice, limits: Mapping[str, float]) -> Picked:
    """A choice as numbers."""
    costs = table.costs(choice)
    return Picked(choice=choice, score=table.score(choice), costs=costs, within_limits=fits(costs, limits))
