"""From a choice of sub-blocks to a child: weights from the parent and the library, FFN runs fused, a model."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from components.core.model.checkpoint import assign_weights
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.layer_files import is_paged, page_layers, state_outside_layers
from components.core.model.layer_numbering import LAYERS
from components.core.text.packing import Batch
from components.search.child.ffn_fusion import ChildLayer, Dependencies, drop_empty, ffn_dependencies, fuse_layers
from components.search.config import Fusion
from components.search.search_table import ChildRecord, ChoiceRecord, LayerShape
from components.search.solver.option_table import OptionTable
from components.search.solver.problem import Choice
from components.search.solver.solve import fits
from components.search.space.layer_space import PARTS, LayerSpace, Variant
from components.search.space.subblocks import Weights, heterogeneous_model, load_block, on_device, subblock_weights


def child_layers(
    parent: TesseraForCausalLM,
    spaces: Sequence[LayerSpace],
    libraries: Sequence[Path],
    variants: Sequence[tuple[Variant, Variant]],
) -> list[ChildLayer]:
    """The layers of a child, one for each of the parent's, not fused yet.

    Args:
        parent: source of every sub-block that stays.
        spaces: options of each layer.
        libraries: folders with the trained variants.
        variants: chosen attention and FFN of each layer.
    """

    def read(number: int) -> Weights:
        weights: Weights = {}
        for part, variant in zip(PARTS, variants[number], strict=True):
            if variant == spaces[number].of(part)[0]:
                weights |= subblock_weights(parent.model.layers[number].state_dict(), part)
            elif not variant.is_no_op:
                weights |= on_device(load_block(libraries, (number, variant)), parent.device)
        return weights

    return [
        ChildLayer(attention.size, ffn.size, partial(read, number), (number,))
        for number, (attention, ffn) in enumerate(variants)
    ]


def assemble(parent: TesseraForCausalLM, layers: Sequence[ChildLayer]) -> TesseraForCausalLM:
    """A model of these layers between the parent's embeddings and head, frozen; `trainable` makes a copy to train.

    It shares the parent's weights, copies none, and is paged where the parent is. Its configuration says in
    `parent_layers`, for each layer, how many layers of the parent are behind its output.
    """
    shape = tuple((layer.num_key_value_heads, layer.intermediate_size) for layer in layers)
    with torch.device("meta"):
        child = heterogeneous_model(parent.config, shape)
    child.requires_grad_(False)
    state = state_outside_layers(parent)
    paged = is_paged(parent.model.layers)
    if paged:
        page_layers(child.model.layers, lambda number: layers[number].read())
    else:
        for number, layer in enumerate(layers):
            state |= {f"{LAYERS}{number}.{name}": tensor for name, tensor in layer.read().items()}
    assign_weights(child, state, strict=not paged)
    child.model.embed_tokens.computes_in = parent.model.embed_tokens.computes_in
    child.config.parent_layers = _depths([layer.parent_layers for layer in layers], len(parent.model.layers))
    return child


def trainable(child: TesseraForCausalLM) -> TesseraForCausalLM:
    """A copy in float32, so that whoever trains it leaves the parent alone.

    Args:
        child: not paged.
    """
    copy = deepcopy(child).requires_grad_(True)
    copy.to(torch.float32)
    copy.model.embed_tokens.computes_in = None
    return copy


def _depths(parent_layers: Sequence[Sequence[int]], depth: int) -> list[int]:
    """For each layer of a child, how many of the parent's are behind its output.

    What was dropped passes its input on, so the output is also that of the dropped layers which follow.
    """
    depths, done = [], 0
    for numbers in parent_layers:
        done = max(done, numbers[-1] + 1)
        depths.append(min((later[0] for later in parent_layers if later[0] >= done), default=depth))
    return depths


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
