"""The model of a choice: its layers, fused, between the parent's embeddings and head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.packing import Batch
from components.search.child.assemble import assemble, child_layers
from components.search.child.ffn_dependency import ffn_dependencies
from components.search.child.ffn_fusion import ChildLayer, Dependencies, drop_empty, fuse_layers
from components.search.child.records import ChildRecord, ChoiceRecord, LayerShape
from components.search.config import Fusion
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Choice
from components.search.solver.solve import fits
from components.search.space.layer_space import LayerSpace, Variant


@dataclass(frozen=True)
class Child:
    """A child before and after fusion.

    Attributes:
        layers: one for each of the parent's.
        fused: the layers of the model as written.
        dependencies: of its FFNs on each other; empty where they were not measured.
        unfused: a model of the layers that are not empty.
        model: the model as written.
    """

    layers: list[ChildLayer]
    fused: list[ChildLayer]
    dependencies: Dependencies
    unfused: TesseraForCausalLM
    model: TesseraForCausalLM

    @property
    def numbers(self) -> list[int]:
        """For each layer as written, the number of the first parent layer that it replaces.

        Files are named by it, so that a store recognises the parent's files.
        """
        return [layer.parent_layers[0] for layer in self.fused]


def make_child(parent: TesseraForCausalLM, layers: list[ChildLayer], config: Fusion, batches: Sequence[Batch]) -> Child:
    """Fuse and assemble.

    Args:
        parent: the embeddings and the head come from it.
        layers: one for each of the parent's.
        config: what to fuse.
        batches: text that the dependency of FFNs is measured on; empty where it is not needed.
    """
    left = drop_empty(layers)
    unfused = assemble(parent, left)
    dependencies = ffn_dependencies(unfused, left, batches)
    fused = fuse_layers(layers, config, dependencies)
    return Child(layers, fused, dependencies, unfused, assemble(parent, fused) if len(fused) != len(left) else unfused)


@dataclass(frozen=True)
class ChildFactory:
    """Makes the child of any choice.

    Attributes:
        parent: the embeddings and the head come from it, and every sub-block that stays.
        spaces: options of each layer.
        libraries: folders with the trained variants.
        fusion: what to fuse.
        batches: text that the dependency of FFNs is measured on.
    """

    parent: TesseraForCausalLM
    spaces: Sequence[LayerSpace]
    libraries: Sequence[Path]
    fusion: Fusion
    batches: Sequence[Batch]

    def child(self, variants: Sequence[tuple[Variant, Variant]], *, with_dependencies: bool = False) -> Child:
        """The child of a choice.

        Args:
            variants: chosen attention and FFN of each layer.
            with_dependencies: measure dependencies even if fusion does not need them.
        """
        layers = child_layers(self.parent, self.spaces, self.libraries, variants)
        needed = with_dependencies or self.fusion.max_dependency is not None
        return make_child(self.parent, layers, self.fusion, self.batches if needed else ())


def choice_record(table: OptionTable, choice: Choice, limits: Mapping[str, float]) -> ChoiceRecord:
    """Score and costs of a choice."""
    costs = table.costs(choice)
    return ChoiceRecord(choice=choice, score=table.score(choice), costs=costs, within_limits=fits(costs, limits))


def child_record(table: OptionTable, choice: Choice, limits: Mapping[str, float], child: Child) -> ChildRecord:
    """Score, costs and layers of a child."""
    return ChildRecord(
        **choice_record(table, choice, limits).model_dump(),
        layers=_shapes(child.layers),
        fused_layers=_shapes(child.fused),
        parameters=child.model.num_parameters(),
    )


def _shapes(layers: Sequence[ChildLayer]) -> tuple[LayerShape, ...]:
    """Shapes of layers."""
    return tuple(
        LayerShape(
            num_key_value_heads=layer.num_key_value_heads,
            intermediate_size=layer.intermediate_size,
            parent_layers=layer.parent_layers,
        )
        for layer in layers
    )
