"""The sub-blocks that each layer of a parent may have; light, so that a plan can check them without torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self

from components.core.architecture import LINEAR, Architecture, BlockConfig, Linear
from components.core.errors import RecipeError
from components.search.config import Space

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
    """What one layer may have; the parent's own variant comes first, the no-op last."""

    attention: tuple[Variant, ...]
    ffn: tuple[Variant, ...]

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
        RecipeError: a width that is no whole number of channels, or KV heads that do not divide the parent's.
    """
    return [
        LayerSpace(
            attention=_attention_variants(space, heads, may_go=layer > 0),
            ffn=_ffn_variants(space, width),
        )
        for layer, (heads, width) in enumerate(parent)
    ]


def _attention_variants(space: Space, own: Size, *, may_go: bool) -> tuple[Variant, ...]:
    """KV head counts from the parent's down, then what has none."""
    without: list[Size] = [LINEAR] * space.linear_attention + [0] * (space.no_op_attention and may_go)
    if not isinstance(own, int) or own == 0:
        return _variants("attention", own, [0] * (own != 0 and 0 in without))
    wanted = {max(1, own // 2), 1} if space.num_key_value_heads is None else set(space.num_key_value_heads)
    for heads in sorted(wanted):
        if heads > own or own % heads:
            divisors = [n for n in range(1, own + 1) if own % n == 0]
            raise RecipeError(
                f"search.num_key_value_heads={heads} does not divide the parent's {own} KV heads",
                hint=f"choose from {', '.join(map(str, divisors))}",
            )
    return _variants("attention", own, [*sorted(wanted - {own}, reverse=True), *without])


def _ffn_variants(space: Space, own: Size) -> tuple[Variant, ...]:
    """FFN widths from the parent's down, then what has none."""
    without: list[Size] = [LINEAR] * space.linear_ffn + [0] * space.no_op_ffn
    if not isinstance(own, int) or own == 0:
        return _variants("ffn", own, [0] * (own != 0 and 0 in without))
    wanted = {_whole_width(fraction, own) for fraction in space.ffn_fractions}
    return _variants("ffn", own, [*sorted(wanted - {own}, reverse=True), *without])


def _variants(part: Part, own: Size, others: Sequence[Size]) -> tuple[Variant, ...]:
    """The parent's own, then the others."""
    return tuple(Variant(part, size) for size in (own, *others))


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
