"""Lineage of a run as rows and arcs: a row for each stage and each given thing, an arc from a maker to a reader."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from components.core.store.store import StageRecord, Store
from pipelines.records.runs import flat, stage_documents

ROW_PX = 46
REACH_PX = 170
"""Width of the widest arc."""


@dataclass(frozen=True)
class Made:
    """An artifact of a row."""

    name: str
    digest: str
    kind: str


@dataclass(frozen=True)
class Row:
    """A stage, or an artifact that the user gave.

    Attributes:
        label: role of the stage, or name of the artifact.
        code: digest of the stage's code; None of what was given.
        made: artifacts that other rows may read.
        above: labels of the rows that this one was made from, directly or not.
    """

    label: str
    code: str | None
    made: tuple[Made, ...]
    above: frozenset[str]


@dataclass(frozen=True)
class Arc:
    """An artifact on its way from one row to another, with the path that draws it."""

    source: str
    target: str
    kind: str
    title: str
    path: str


@dataclass
class Lineage:
    """Rows in an order in which they can be made, and arcs between them."""

    rows: list[Row] = field(default_factory=list)
    arcs: list[Arc] = field(default_factory=list)

    @property
    def height(self) -> int:
        """Of the drawing, pixels."""
        return ROW_PX * len(self.rows)


def run_lineage(store: Store, run: str, sources: Mapping[str, str]) -> Lineage:
    """The lineage of one run, from stage records alone."""
    lineage = Lineage()
    maker: dict[str, int] = {}
    for name, digest in sources.items():
        maker[digest] = len(lineage.rows)
        lineage.rows.append(Row(name, None, (Made(name, digest, _kind(store, digest)),), frozenset()))
    for label, document in _in_order(store, run):
        record = store.stage_record(document["key"])
        if record is None:
            continue
        read = {name: digest for name, digest in flat(record.inputs).items() if digest in maker}
        lineage.arcs += _arcs(store, label, len(lineage.rows), read, maker, lineage.rows)
        lineage.rows.append(_row(store, label, record, {lineage.rows[maker[digest]] for digest in read.values()}))
        for digest in record.outputs.values():
            maker.setdefault(digest, len(lineage.rows) - 1)
    return lineage


def _in_order(store: Store, run: str) -> list[tuple[str, dict[str, Any]]]:
    """Stages in the order in which they ended, so that makers come before readers."""
    return sorted(stage_documents(store, run).items(), key=lambda item: item[1]["finished"])


def _row(store: Store, label: str, record: StageRecord, parents: set[Row]) -> Row:
    above = {parent.label for parent in parents}.union(*(parent.above for parent in parents))
    made = tuple(Made(name, digest, _kind(store, digest)) for name, digest in record.outputs.items())
    return Row(label, record.code, made, frozenset(above))


def _arcs(
    store: Store, label: str, row: int, read: Mapping[str, str], maker: Mapping[str, int], rows: list[Row]
) -> list[Arc]:
    """The arcs into a row, widest first; several artifacts of one maker share one."""
    by_maker: dict[int, list[tuple[str, str]]] = {}
    for name, digest in read.items():
        by_maker.setdefault(maker[digest], []).append((name, digest))
    arcs = []
    for above, artifacts in sorted(by_maker.items()):
        kinds = [_kind(store, digest) for _, digest in artifacts]
        kind = "model" if "model" in kinds else kinds[0]
        names = ", ".join(f"{name} {digest[:12]}" for name, digest in artifacts)
        arcs.append(Arc(rows[above].label, label, kind, f"{rows[above].label} → {label}: {names}", _path(above, row)))
    return arcs


def _path(above: int, below: int) -> str:
    """A curve that leaves the column of rows to the left, the farther the longer the way."""
    y0, y1 = (ROW_PX * (row + 0.5) for row in (above, below))
    reach = REACH_PX - min(REACH_PX - 12, 26 * (below - above) ** 0.7)
    return f"M{REACH_PX} {y0:.0f} C{reach:.0f} {y0:.0f} {reach:.0f} {y1:.0f} {REACH_PX} {y1:.0f}"


def _kind(store: Store, digest: str) -> str:
    return store.manifest(digest).kind
