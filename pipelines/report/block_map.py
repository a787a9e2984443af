"""The map of an architecture: a column a layer of the parent, a cell a subblock; the report's template draws it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from components.core.model.architecture import LINEAR, Architecture, Linear
from pipelines.report.margins_view import Place, margin_notes

CellKind = Literal["own", "smaller", "linear", "none", "fused"]
Size = int | Linear


@dataclass(frozen=True)
class Cell:
    """A subblock.

    Attributes:
        size: KV heads or FFN channels; 0 where there is nothing, `linear` where there is one matrix.
        start: first column, from 1.
        span: columns.
        kind: the parent's own, a smaller one, one matrix, nothing, or several in one.
        share: size over the largest of its part on the map, for shading.
        title: the same in words.
    """

    size: Size
    start: int
    span: int
    kind: CellKind
    share: float
    title: str


@dataclass(frozen=True)
class BlockMap:
    """The subblocks of one model on the columns of its parent."""

    title: str
    note: str
    columns: int
    attention: tuple[Cell, ...]
    ffn: tuple[Cell, ...]


@dataclass(frozen=True)
class Layer:
    """A layer as the map needs it: sizes as in a cell, and the parent's layers that it stands for."""

    num_key_value_heads: Size
    intermediate_size: Size
    parent_layers: Sequence[int]


def search_maps(table: Mapping[str, Any]) -> dict[str, BlockMap]:
    """Parent, child as chosen, child as written, and the baselines as chosen, from `search.json`."""
    heads, widths = ([slot["options"][0]["size"] for slot in table["slots"][part::2]] for part in (0, 1))
    parent = [Layer(*sizes, (number,)) for number, sizes in enumerate(zip(heads, widths, strict=True))]
    notes = {place: note.told for place, note in margin_notes(table).items()}
    chosen = {name: [Layer(**layer) for layer in table[name]["layers"]] for name in CHOSEN}
    written = [Layer(**layer) for layer in table["child"]["fused_layers"]]
    fused = sum(len(layer.parent_layers) > 1 for layer in written)
    runs = {0: "no run of FFNs to fuse", 1: "one run of FFNs fused"}.get(fused, f"{fused} runs of FFNs fused")
    return {
        "parent": block_map("Parent", f"{len(parent)} layers", parent, parent),
        "chosen": block_map("Child, as chosen", _counted(chosen["child"]), chosen["child"], parent, notes),
        "written": block_map("Child, as written", f"{len(written)} layers, {runs}", written, parent),
        "greedy": block_map("Greedy choice", _counted(chosen["greedy_child"]), chosen["greedy_child"], parent),
        "random": block_map("Random choice", _counted(chosen["random_child"]), chosen["random_child"], parent),
    }


CHOSEN = ("child", "greedy_child", "random_child")


def model_map(title: str, shape: Architecture) -> BlockMap:
    """A model by itself, from its configuration."""
    layers = [
        Layer(block.num_key_value_heads or 0, block.intermediate_size or 0, (number,))
        for number, block in enumerate(shape.blocks)
    ]
    largest = Layer(max(map(_count, _heads(layers))), max(map(_count, _widths(layers))), ())
    return block_map(title, f"{len(layers)} layers", layers, [largest] * len(layers))


def block_map(
    title: str, note: str, layers: Sequence[Layer], parent: Sequence[Layer], notes: Mapping[Place, str] | None = None
) -> BlockMap:
    """Lay layers out on the columns of the parent; columns that no layer stands for stay empty.

    Args:
        title: of the map.
        note: beside it.
        layers: of the model.
        parent: its layers.
        notes: what is told of single places besides.
    """
    attention = _cells([(layer, layer.num_key_value_heads) for layer in layers], _heads(parent), "KV heads")
    ffn = _cells([(layer, layer.intermediate_size) for layer in layers], _widths(parent), "FFN channels")
    both = (_noted(attention, "attention", notes or {}), _noted(ffn, "ffn", notes or {}))
    return BlockMap(title, note, len(parent), *both)


def _noted(cells: Iterator[Cell], part: str, notes: Mapping[Place, str]) -> tuple[Cell, ...]:
    """The cells with what is told of their places."""
    told = ((cell, notes.get((cell.start - 1, part))) for cell in cells)
    return tuple(replace(cell, title=f"{cell.title} ({note})") if note else cell for cell, note in told)


def _cells(layers: Sequence[tuple[Layer, Size]], own: Sequence[Size], what: str) -> Iterator[Cell]:
    """The cells of one part, a column that was dropped with its layer as an empty one."""
    largest = max(map(_count, own)) or 1
    next_column = 0
    for layer, size in layers:
        first, last = min(layer.parent_layers), max(layer.parent_layers)
        yield from (_empty(column, what) for column in range(next_column, first))
        next_column = last + 1
        if not size:
            yield from (_empty(column, what) for column in range(first, next_column))
            continue
        fused = len(layer.parent_layers) > 1
        kind: CellKind = "fused" if fused else "own" if size == own[first] else "smaller"
        kind = "linear" if size == LINEAR else kind
        where = f"layers {first} to {last} in one" if fused else f"layer {first}"
        yield Cell(
            size, first + 1, last - first + 1, kind, min(1.0, _count(size) / largest), f"{where}: {_words(size, what)}"
        )
    yield from (_empty(column, what) for column in range(next_column, len(own)))


def _empty(column: int, what: str) -> Cell:
    return Cell(0, column + 1, 1, "none", 0.0, f"layer {column}: no {what}")


def _words(size: Size, what: str) -> str:
    return f"one matrix instead of {what}" if size == LINEAR else f"{size:,} {what}"


def _count(size: Size) -> int:
    """Heads or channels, for shading and comparison; none of one matrix."""
    return 0 if size == LINEAR else size


def _heads(layers: Sequence[Layer]) -> list[Size]:
    return [layer.num_key_value_heads for layer in layers]


def _widths(layers: Sequence[Layer]) -> list[Size]:
    return [layer.intermediate_size for layer in layers]


def _counted(layers: Sequence[Layer]) -> str:
    """How many subblocks are left."""
    attention, ffn = (sum(size != 0 for size in sizes) for sizes in (_heads(layers), _widths(layers)))
    return f"attention in {attention} and FFN in {ffn} of {len(layers)} layers"
