"""Diagrams of the report, laid out here and drawn by the template: architecture maps, and the lineage of a run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from components.core.model.architecture import LINEAR, Architecture, Linear
from components.core.store.store import Store, digests_by_name
from pipelines.records.runs import stage_documents
from pipelines.report.search_tables import SlotId, slot_notes

# Architecture maps: a column for each layer of the parent, a cell for each sub-block

CellKind = Literal["own", "smaller", "linear", "none", "fused"]
Size = int | Linear
UNITS = {"attention": "KV heads", "ffn": "FFN channels"}


@dataclass(frozen=True)
class Cell:
    """A sub-block.

    Attributes:
        size: KV heads or FFN channels; 0 for a no-op, `linear` for a linear replacement.
        start: first column, from 1.
        span: number of columns.
        kind: as in the parent, smaller, linear, no-op, or several fused into one.
        share: size as a share of the largest in the parent, for shading.
        title: description in words.
    """

    size: Size
    start: int
    span: int
    kind: CellKind
    share: float
    title: str


@dataclass(frozen=True)
class ArchitectureMap:
    """The sub-blocks of one model on the columns of its parent."""

    title: str
    note: str
    columns: int
    attention: tuple[Cell, ...]
    ffn: tuple[Cell, ...]


@dataclass(frozen=True)
class Layer:
    """Sizes of a layer's sub-blocks, as in `Cell`, and the layers of the parent that it replaces."""

    num_key_value_heads: Size
    intermediate_size: Size
    parent_layers: Sequence[int]


def search_maps(table: Mapping[str, Any]) -> dict[str, ArchitectureMap]:
    """Maps of the parent, the child as chosen and after fusion, and the baselines.

    Args:
        table: `search.json`.
    """
    heads, widths = ([slot["options"][0]["size"] for slot in table["slots"][part::2]] for part in (0, 1))
    parent = [Layer(*sizes, (number,)) for number, sizes in enumerate(zip(heads, widths, strict=True))]
    chosen, greedy, random = (
        [Layer(**layer) for layer in table[name]["layers"]] for name in ("child", "greedy_child", "random_child")
    )
    fused = [Layer(**layer) for layer in table["child"]["fused_layers"]]
    num_fused = sum(len(layer.parent_layers) > 1 for layer in fused)
    fusion = {0: "no FFNs fused", 1: "one run of FFNs fused"}.get(num_fused, f"{num_fused} runs of FFNs fused")
    notes = {slot: note.text for slot, note in slot_notes(table).items()}
    return {
        "parent": architecture_map("Parent", f"{len(parent)} layers", parent, parent),
        "chosen": architecture_map("Child, as chosen", _subblock_counts(chosen), chosen, parent, notes),
        "fused": architecture_map("Child, after fusion", f"{len(fused)} layers, {fusion}", fused, parent),
        "greedy": architecture_map("Greedy choice", _subblock_counts(greedy), greedy, parent),
        "random": architecture_map("Random choice", _subblock_counts(random), random, parent),
    }


def model_map(title: str, architecture: Architecture) -> ArchitectureMap:
    """Map of a model without a parent; shades are relative to its own largest sub-blocks."""
    layers = [
        Layer(block.num_key_value_heads or 0, block.intermediate_size or 0, (number,))
        for number, block in enumerate(architecture.blocks)
    ]
    largest = Layer(
        max(_count(layer.num_key_value_heads) for layer in layers),
        max(_count(layer.intermediate_size) for layer in layers),
        (),
    )
    return architecture_map(title, f"{len(layers)} layers", layers, [largest] * len(layers))


def architecture_map(
    title: str, note: str, layers: Sequence[Layer], parent: Sequence[Layer], notes: Mapping[SlotId, str] | None = None
) -> ArchitectureMap:
    """Lay layers out on the columns of the parent; columns of dropped layers stay empty.

    Args:
        title: of the map.
        note: text after the title.
        layers: of the model.
        parent: layers of the parent.
        notes: further text on single sub-blocks.
    """
    attention = [(layer.parent_layers, layer.num_key_value_heads) for layer in layers]
    ffn = [(layer.parent_layers, layer.intermediate_size) for layer in layers]
    return ArchitectureMap(
        title,
        note,
        len(parent),
        tuple(_cells(attention, [layer.num_key_value_heads for layer in parent], "attention", notes or {})),
        tuple(_cells(ffn, [layer.intermediate_size for layer in parent], "ffn", notes or {})),
    )


def _cells(
    subblocks: Sequence[tuple[Sequence[int], Size]], own: Sequence[Size], part: str, notes: Mapping[SlotId, str]
) -> Iterator[Cell]:
    """Cells of the attention or of the FFN, left to right."""
    largest = max(map(_count, own)) or 1
    next_column = 0

    def described(text: str, column: int) -> str:
        note = notes.get((column, part))
        return f"{text} ({note})" if note else text

    def no_op(column: int) -> Cell:
        return Cell(0, column + 1, 1, "none", 0.0, described(f"layer {column}: no {UNITS[part]}", column))

    for parent_layers, size in subblocks:
        first, last = min(parent_layers), max(parent_layers)
        yield from map(no_op, range(next_column, first if size else last + 1))
        next_column = last + 1
        if not size:
            continue
        fused = len(parent_layers) > 1
        kind: CellKind = "fused" if fused else "own" if size == own[first] else "smaller"
        kind = "linear" if size == LINEAR else kind
        where = f"layers {first} to {last} in one" if fused else f"layer {first}"
        content = f"one matrix instead of {UNITS[part]}" if size == LINEAR else f"{size:,} {UNITS[part]}"
        share = min(1.0, _count(size) / largest)
        yield Cell(size, first + 1, last - first + 1, kind, share, described(f"{where}: {content}", first))
    yield from map(no_op, range(next_column, len(own)))


def _count(size: Size) -> int:
    """Heads or channels; a linear replacement has none."""
    return 0 if size == LINEAR else size


def _subblock_counts(layers: Sequence[Layer]) -> str:
    attention = sum(layer.num_key_value_heads != 0 for layer in layers)
    ffn = sum(layer.intermediate_size != 0 for layer in layers)
    return f"attention in {attention} and FFN in {ffn} of {len(layers)} layers"


# Lineage: a row for each stage and each source, an arc from a producer to a consumer

ROW_PX = 46
WIDTH_PX = 170
"""Width of the widest arc."""


@dataclass(frozen=True)
class RowArtifact:
    """An artifact that a row produced."""

    name: str
    digest: str
    kind: str


@dataclass(frozen=True)
class LineageRow:
    """A stage, or an artifact that the user supplied.

    Attributes:
        label: label of the stage, or name of the source.
        code: digest of the stage's code; None for a source.
        outputs: artifacts that other rows may read.
        ancestors: labels of the rows that this one depends on, directly or not.
    """

    label: str
    code: str | None
    outputs: tuple[RowArtifact, ...]
    ancestors: frozenset[str]


@dataclass(frozen=True)
class Arc:
    """Artifacts that one row reads from another, and the SVG path between the two."""

    source: str
    target: str
    kind: str
    title: str
    path: str


@dataclass
class LineageDiagram:
    """Rows, producers before consumers, and the arcs between them."""

    rows: list[LineageRow] = field(default_factory=list)
    arcs: list[Arc] = field(default_factory=list)

    @property
    def height(self) -> int:
        """Height of the drawing, pixels."""
        return ROW_PX * len(self.rows)

    def css_classes(self, *labels: str) -> str:
        """`of-N` for each row N that is, or descends from, all of these rows; the style sheet highlights by it."""
        wanted = set(labels)
        return " ".join(f"of-{i}" for i, row in enumerate(self.rows) if wanted <= {row.label, *row.ancestors})


def lineage_diagram(store: Store, run: str, sources: Mapping[str, str]) -> LineageDiagram:
    """Build the diagram of a run from its stage records.

    Args:
        store: has the run.
        run: its name.
        sources: digests of the artifacts that the user supplied, by name.
    """
    diagram = LineageDiagram()
    producers: dict[str, int] = {}
    for name, digest in sources.items():
        producers[digest] = len(diagram.rows)
        output = RowArtifact(name, digest, store.manifest(digest).kind)
        diagram.rows.append(LineageRow(name, None, (output,), frozenset()))
    documents = stage_documents(store, run)
    for label in sorted(documents, key=lambda label: documents[label]["finished"]):
        record = store.stage_record(documents[label]["key"])
        if record is None:
            continue
        by_producer: dict[int, list[RowArtifact]] = {}
        for name, digest in digests_by_name(record.inputs).items():
            if digest in producers:
                artifact = RowArtifact(name, digest, store.manifest(digest).kind)
                by_producer.setdefault(producers[digest], []).append(artifact)
        parents = [diagram.rows[number] for number in by_producer]
        number = len(diagram.rows)
        diagram.arcs += [_arc(diagram.rows[i], i, label, number, read) for i, read in sorted(by_producer.items())]
        ancestors = {parent.label for parent in parents}.union(*(parent.ancestors for parent in parents))
        outputs = tuple(RowArtifact(name, each, store.manifest(each).kind) for name, each in record.outputs.items())
        diagram.rows.append(LineageRow(label, record.code, outputs, frozenset(ancestors)))
        for output in outputs:
            producers.setdefault(output.digest, number)
    return diagram


def _arc(producer: LineageRow, start: int, consumer: str, end: int, artifacts: list[RowArtifact]) -> Arc:
    """One arc for all artifacts of one producer; it bends further to the left the more rows it spans."""
    kinds = [artifact.kind for artifact in artifacts]
    names = ", ".join(f"{artifact.name} {artifact.digest[:12]}" for artifact in artifacts)
    y0, y1 = (ROW_PX * (row + 0.5) for row in (start, end))
    bend = WIDTH_PX - min(WIDTH_PX - 12, 26 * (end - start) ** 0.7)
    return Arc(
        source=producer.label,
        target=consumer,
        kind="model" if "model" in kinds else kinds[0],
        title=f"{producer.label} → {consumer}: {names}",
        path=f"M{WIDTH_PX} {y0:.0f} C{bend:.0f} {y0:.0f} {bend:.0f} {y1:.0f} {WIDTH_PX} {y1:.0f}",
    )
