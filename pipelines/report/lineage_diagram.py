"""Lineage of a run as a diagram: a row for each stage and each source, an arc from a producer to a consumer."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from components.core.store.store import Store, digests_by_name
from pipelines.records.runs import stage_documents

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
class Row:
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

    rows: list[Row] = field(default_factory=list)
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
        diagram.rows.append(Row(name, None, (output,), frozenset()))
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
        diagram.rows.append(Row(label, record.code, outputs, frozenset(ancestors)))
        for output in outputs:
            producers.setdefault(output.digest, number)
    return diagram


def _arc(producer: Row, start: int, consumer: str, end: int, artifacts: list[RowArtifact]) -> Arc:
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
