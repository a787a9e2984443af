"""The sub-blocks that each layer of a parent may have; light, so that a plan can check them without torch."""

from dataclasses import dataclass
from typing import Literal

from components.core.errors import RecipeError
from components.search.config import Space

Part = Literal["attention", "ffn"]
PARTS: tuple[Part, Part] = ("attention", "ffn")


@dataclass(frozen=True, order=True)
class Variant:
    """One way to build the attention or the FFN of a layer.

    Attributes:
        part: which of the two.
        size: KV heads of an attention, channels of an FFN; 0 is the no-op.
    """

    part: Part
    size: int

    @property
    def name(self) -> str:
        """Short name, also the file name of its weights."""
        return f"{self.part}-{self.size}"


@dataclass(frozen=True)
class LayerSpace:
    """What one layer may have; the parent's own variant comes first, the no-op last."""

    attention: tuple[Variant, ...]
    ffn: tuple[Variant, ...]

    def of(self, part: Part) -> tuple[Variant, ...]:
        """The variants of one part."""
        return self.attention if part == "attention" else self.ffn

    def trained(self, part: Part) -> tuple[Variant, ...]:
        """The variants of one part that need weights of their own: neither the parent's nor the no-op."""
        return tuple(variant for variant in self.of(part)[1:] if variant.size > 0)


Shape = tuple[tuple[int, int], ...]
"""KV heads and FFN channels of each layer of a model; 0 where there is none."""


def layer_spaces(space: Space, parent: Shape) -> list[LayerSpace]:
    """The options of every layer of a parent of this shape.

    Raises:
        RecipeError: a width that is no whole number of channels, or KV heads that do not divide the parent's.
    """
    return [
        LayerSpace(
            attention=_attention_variants(space, heads, may_go=layer > 0),
            ffn=_ffn_variants(space, width),
        )
        for layer, (heads, width) in enumerate(parent)
    ]


def _attention_variants(space: Space, own: int, *, may_go: bool) -> tuple[Variant, ...]:
    """KV head counts from the parent's down."""
    if own == 0:
        return (Variant("attention", 0),)
    wanted = {max(1, own // 2), 1} if space.num_key_value_heads is None else set(space.num_key_value_heads)
    for heads in sorted(wanted):
        if heads > own or own % heads:
            divisors = [n for n in range(1, own + 1) if own % n == 0]
            raise RecipeError(
                f"search.num_key_value_heads={heads} does not divide the parent's {own} KV heads",
                hint=f"choose from {', '.join(map(str, divisors))}",
            )
    sizes = [own, *sorted(wanted - {own}, reverse=True), *([0] if space.no_op_attention and may_go else [])]
    return tuple(Variant("attention", size) for size in sizes)


def _ffn_variants(space: Space, own: int) -> tuple[Variant, ...]:
    """FFN widths from the parent's down."""
    if own == 0:
        return (Variant("ffn", 0),)
    wanted = {_whole_width(fraction, own) for fraction in space.ffn_fractions}
    sizes = [own, *sorted(wanted - {own}, reverse=True), *([0] if space.no_op_ffn else [])]
    return tuple(Variant("ffn", size) for size in sizes)


def _whole_width(fraction: float, own: int) -> int:
    """The number of channels that a fraction of the parent's stands for."""
    width = round(fraction * own)
    if width < 1 or abs(width - fraction * own) > 1e-6 * own:
        raise RecipeError(
            f"search.ffn_fractions={fraction:g} of intermediate_size={own} is {fraction * own:g} channels, "
            "not a whole number",
            hint=f"use {max(1, width)}/{own} = {max(1, width) / own:g}",
        )
    return width
