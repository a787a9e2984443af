"""The sub-blocks that each layer of a parent may have; light, so that a plan can check them without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, Self

from components.core.base.errors import RecipeError
from components.core.model.architecture import LINEAR, Architecture, BlockConfig, Linear
from components.search.config import LayerRules, Space, Without

Part = Literal["attention", "ffn"]
PARTS: tuple[Part, Part] = ("attention", "ffn")

Size = int | Linear
"""KV heads of an attention, channels of an FFN; 0 is the no-op, `linear` one matrix in place of either."""


@dataclass(frozen=True)
class Variant:
    """One way to build the attention or the FFN of a layer.

    Attributes:
        part: which of the two.
        size: see `Size`.
    """

    part: Part
    size: Size

    @property
    def name(self) -> str:
        """Short name, also the file name of its weights."""
        return f"{self.part}-{self.size}"

    @property
    def is_no_op(self) -> bool:
        """Whether it is nothing at all, and has no weights."""
        return self.size == 0

    @property
    def is_linear(self) -> bool:
        """Whether it is one matrix."""
        return self.size == LINEAR

    @property
    def count(self) -> int:
        """KV heads or channels; 0 of the no-op and of a linear one."""
        return 0 if self.size == LINEAR else self.size

    @property
    def num_key_value_heads(self) -> int:
        """KV heads that take cache; 0 of an FFN."""
        return self.count if self.part == "attention" else 0

    def __lt__(self, other: Self) -> bool:
        """Order by part, then from the no-op up, linear ones last."""
        return self._place < other._place

    @property
    def _place(self) -> tuple[Part, bool, int]:
        return self.part, self.is_linear, self.count


@dataclass(frozen=True)
class LayerSpace:
    """What one layer may have; the parent's own variant comes first, the no-op last.

    Attributes:
        attention: variants of its attention.
        ffn: variants of its FFN.
        fixed: those among them that the recipe fixes.
    """

    attention: tuple[Variant, ...]
    ffn: tuple[Variant, ...]
    fixed: tuple[Variant, ...] = ()

    def of(self, part: Part) -> tuple[Variant, ...]:
        """The variants of one part."""
        return self.attention if part == "attention" else self.ffn

    def trained(self, part: Part) -> tuple[Variant, ...]:
        """The variants of one part that need weights of their own: neither the parent's nor the no-op."""
        return tuple(variant for variant in self.of(part)[1:] if not variant.is_no_op)


Shape = tuple[tuple[Size, Size], ...]
"""Attention and FFN of each layer of a model."""


def shape_of(parent: Architecture) -> Shape:
    """The attention and the FFN of every layer."""
    return tuple((block.num_key_value_heads or 0, block.intermediate_size or 0) for block in parent.blocks)


def block_of(attention: Size, ffn: Size) -> BlockConfig:
    """A layer of a model."""
    return BlockConfig(num_key_value_heads=attention or None, intermediate_size=ffn or None)


def layer_spaces(space: Space, parent: Shape) -> list[LayerSpace]:
    """The options of every layer of a parent of this shape.

    Raises:
        RecipeError: a width that is no whole number of channels, KV heads that do not divide the parent's, rules of
            layers that the parent does not have, or a fixed sub-block that vLLM cannot run.
    """
    rules = _rules_by_layer(space, len(parent))
    largest = tuple(max((size for size in sizes if size != LINEAR), default=0) for sizes in zip(*parent, strict=True))
    return [
        _layer_space(space, rules.get(layer, LayerRules()), layer, own, largest) for layer, own in enumerate(parent)
    ]


def left_out(space: Space, parent: Shape) -> str | None:
    """Message naming the variants left out because vLLM cannot run them, or None."""
    everything = layer_spaces(space.model_copy(update={"allow_plugin_only_blocks": True}), parent)
    layers: dict[str, list[int]] = {}
    for layer, (all_, offered) in enumerate(zip(everything, layer_spaces(space, parent), strict=True)):
        for variant in {*all_.attention, *all_.ffn} - {*offered.attention, *offered.ffn}:
            layers.setdefault(variant.name, []).append(layer)
    if not layers:
        return None
    named = [f"{name} in {_layer_names(numbers, len(parent))}" for name, numbers in sorted(layers.items())]
    return (
        f"left out, since vLLM cannot run it alone: {', '.join(named)}; search.allow_plugin_only_blocks=true offers it"
    )


def servable(variant: Variant, tensor_parallel: int) -> bool:
    """Whether vLLM can share a sub-block among so many devices.

    KV heads are split, or each is copied to as many devices; channels are split; one matrix is copied to all.
    """
    if variant.part == "attention" and variant.count:
        return variant.count % tensor_parallel == 0 or tensor_parallel % variant.count == 0
    return variant.count % tensor_parallel == 0


def servable_spaces(spaces: Sequence[LayerSpace], tensor_parallel: int) -> list[LayerSpace]:
    """The options that so many devices can share.

    Raises:
        RecipeError: they cannot share the parent's own sub-block of a layer.
    """
    for layer, space in enumerate(spaces):
        for own in (space.attention[0], space.ffn[0]):
            if not servable(own, tensor_parallel):
                raise RecipeError(
                    f"the parent's {own.name} of layer {layer} cannot be shared by "
                    f"measurement.tensor_parallel={tensor_parallel} devices",
                    hint="choose a degree that divides KV heads and channels",
                )
    return [
        replace(
            space,
            attention=tuple(variant for variant in space.attention if servable(variant, tensor_parallel)),
            ffn=tuple(variant for variant in space.ffn if servable(variant, tensor_parallel)),
        )
        for space in spaces
    ]


def kv_copies(num_key_value_heads: int, tensor_parallel: int) -> int:
    """Devices that hold the same KV head, where there are more devices than heads."""
    return max(1, tensor_parallel // max(1, num_key_value_heads))


def runs_by_itself(variant: Variant, layer: int) -> bool:
    """Whether vLLM runs a sub-block without our plug-in: no linear one, and the first layer needs its attention."""
    return not variant.is_linear and not (layer == 0 and variant.part == "attention" and variant.is_no_op)


def _rules_by_layer(space: Space, num_layers: int) -> dict[int, LayerRules]:
    """The rules of each layer that has some."""
    found: dict[int, LayerRules] = {}
    for name, rules in space.layers.items():
        first, _, last = name.partition("-")
        layers = range(int(first), int(last or first) + 1)
        if not layers or layers[-1] >= num_layers:
            hint = f"layers are counted from 0 to {num_layers - 1}, the first of a range first"
            raise RecipeError(f"search.layers.{name}: the parent has {num_layers} layers", hint=hint)
        if twice := found.keys() & set(layers):
            raise RecipeError(f"search.layers.{name}: layer {min(twice)} has rules already", hint="name a layer once")
        found |= dict.fromkeys(layers, rules)
    return found


def _layer_space(
    space: Space, rules: LayerRules, layer: int, own: tuple[Size, Size], largest: Sequence[int]
) -> LayerSpace:
    """The options of one layer.

    Args:
        space: of all layers.
        rules: of this one.
        layer: its number.
        own: the parent's attention and FFN there.
        largest: the most KV heads and channels of any layer.
    """
    set_here = {name: value for name, value in rules if value is not None and name in Space.model_fields}
    space = space.model_copy(update=set_here)
    options: dict[Part, tuple[Variant, ...]] = {}
    fixed: list[Variant] = []
    for part, size, most, wanted in zip(PARTS, own, largest, (rules.attention, rules.ffn), strict=True):
        here = space if wanted is None else _fixed_space(space, part, wanted)
        options[part] = _variants(here, part, layer, size, most)
        if wanted is not None:
            _check_fixed(options[part][-1], wanted, size, layer)
            fixed.append(options[part][-1])
    return LayerSpace(options["attention"], options["ffn"], tuple(fixed))


def _fixed_space(space: Space, part: Part, wanted: Without | int) -> Space:
    """The space with only this option for a part, next to the parent's own."""
    sizes = (wanted,) if isinstance(wanted, int) else ()
    of_part = {"attention": {"num_key_value_heads": sizes}, "ffn": {"ffn_fractions": (), "intermediate_sizes": sizes}}
    kinds = {f"linear_{part}": wanted == LINEAR, f"no_op_{part}": wanted == "no_op"}
    return space.model_copy(update={**of_part[part], **kinds})


def _check_fixed(found: Variant, wanted: Without | int, own: Size, layer: int) -> None:
    """Refuse a fixed option that the layer cannot have."""
    size: Size = own if wanted == "own" else 0 if wanted == "no_op" else wanted
    if found.size == size:
        return
    name = Variant(found.part, size).name
    if own in (0, LINEAR):
        raise RecipeError(f"layer {layer} cannot have {name}: the parent has {Variant(found.part, own).name} there")
    raise RecipeError(
        f"layer {layer} cannot have {name}: vLLM cannot run it alone",
        hint="search.allow_plugin_only_blocks=true has it run by Tessera's plug-in",
    )


def _variants(space: Space, part: Part, layer: int, own: Size, most: int) -> tuple[Variant, ...]:
    """The parent's own, smaller ones, one matrix, nothing."""
    smaller: list[Size] = []
    if isinstance(own, int) and own > 0:
        smaller += _heads(space, own, most) if part == "attention" else _widths(space, own, most)
        smaller += [LINEAR] * (space.linear_attention if part == "attention" else space.linear_ffn)
    if own != 0:
        smaller += [0] * (space.no_op_attention if part == "attention" else space.no_op_ffn)
    variants = [Variant(part, size) for size in smaller]
    served = [variant for variant in variants if space.allow_plugin_only_blocks or runs_by_itself(variant, layer)]
    return (Variant(part, own), *served)


def _heads(space: Space, own: int, most: int) -> list[int]:
    """KV head counts below the parent's, from the most down."""
    divisors = [count for count in range(1, own + 1) if own % count == 0]
    if space.num_key_value_heads is None:
        return sorted({*divisors[:1], *divisors[-2:]} - {own}, reverse=True)
    wanted = {heads for heads in space.num_key_value_heads if not own < heads <= most}
    for heads in sorted(wanted - set(divisors)):
        raise RecipeError(
            f"search.num_key_value_heads={heads} does not divide the parent's {own} KV heads",
            hint=f"choose from {', '.join(map(str, divisors))}",
        )
    return sorted(wanted - {own}, reverse=True)


def _widths(space: Space, own: int, most: int) -> list[int]:
    """FFN widths below the parent's, from the widest down."""
    given = {width for width in space.intermediate_sizes if not own < width <= most}
    if given and max(given) > most:
        raise RecipeError(f"search.intermediate_sizes={max(given)} is wider than the parent's {own} channels")
    wanted = given | {_whole_width(fraction, own) for fraction in space.ffn_fractions}
    return sorted(wanted - {own}, reverse=True)


def _whole_width(fraction: float, own: int) -> int:
    """The number of channels that a fraction of the parent's stands for."""
    width = round(fraction * own)
    if width < 1 or abs(width - fraction * own) > 1e-6 * own:
        raise RecipeError(
            f"search.ffn_fractions={fraction:g} of intermediate_size={own} is {fraction * own:g} channels, "
            "not a whole number",
            hint=f"use {max(1, width)}/{own} = {max(1, width) / own:g}, or give channels in search.intermediate_sizes",
        )
    return width


def _layer_names(layers: Sequence[int], num_layers: int) -> str:
    """Numbers of layers in words: ranges, where they follow each other."""
    if len(layers) == num_layers:
        return "every layer"
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda item: item[1] - item[0])]
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(spans)}"
