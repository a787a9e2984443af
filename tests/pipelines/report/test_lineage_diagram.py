from pathlib import Path

import pytest

from components.core.store.store import Store, open_store
from pipelines.records.runs import artifacts
from pipelines.report.lineage_diagram import lineage_diagram
from tests.pipelines.made_up_run import make_run, put

STEPS = {"search/importance", "search/costs"} | {
    f"search/{step}-{shard}" for step in ("library", "scores") for shard in (0, 1)
}
SEARCH_READS = {"data", "parent", *STEPS}


@pytest.fixture(scope="module")
def store(made_up_store: Store) -> Store:
    return made_up_store


def test_rows_are_stages_with_their_outputs_producers_before_consumers(store: Store) -> None:
    lineage = lineage_diagram(store, "demo-1", {})
    places = {row.label: place for place, row in enumerate(lineage.rows)}
    assert all(places[arc.source] < places[arc.target] for arc in lineage.arcs)
    digests = {made.name: made.digest for made in lineage.rows[places["rl"]].outputs}
    assert digests == {"policy": artifacts(store, "demo-1")["rl"]}


def test_arcs_are_the_inputs_of_the_stages(store: Store) -> None:
    arcs = {(arc.source, arc.target): arc for arc in lineage_diagram(store, "demo-1", {}).arcs}
    into = {target: {source for source, reader in arcs if reader == target} for _, target in arcs}
    assert into["distill"] == {"data", "parent", "search"}
    assert into["search"] == SEARCH_READS
    assert into["deploy"] == {"rl", "eval"}
    assert arcs["search", "distill"].kind == "model"
    assert artifacts(store, "demo-1")["child"][:12] in arcs["search", "distill"].title


def test_a_row_lists_all_its_ancestors(store: Store) -> None:
    ancestors = {row.label: row.ancestors for row in lineage_diagram(store, "demo-1", {}).rows}
    assert ancestors["data"] == frozenset()
    assert ancestors["distill"] == {*SEARCH_READS, "search"}
    assert "eval" not in ancestors["rl"]


def test_a_row_is_highlighted_with_its_ancestors_and_the_arcs_between_them(store: Store) -> None:
    diagram = lineage_diagram(store, "demo-1", {})
    labels = [row.label for row in diagram.rows]
    highlighted = f"of-{labels.index('distill')}"
    rows = {label for label in labels if highlighted in diagram.css_classes(label).split()}
    assert rows == {*SEARCH_READS, "search", "distill"}
    arcs = {(arc.source, arc.target) for arc in diagram.arcs}
    expected = {(source, target) for source, target in arcs if {source, target} <= rows}
    assert {arc for arc in arcs if highlighted in diagram.css_classes(*arc).split()} == expected


def test_a_source_is_a_row_of_its_own(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    make_run(store)
    record = store.document("runs/demo-1/stages/rl.json")
    rl = store.stage_record(record["key"])
    assert rl is not None
    lineage = lineage_diagram(store, "demo-1", {"own_problems": str(rl.inputs["problems"])})
    assert lineage.rows[0].label == "own_problems"
    assert lineage.rows[0].code is None
    assert {("own_problems", "rl"), ("own_problems", "eval")} <= {(arc.source, arc.target) for arc in lineage.arcs}


def test_an_input_that_no_row_produced_has_no_arc(store: Store, tmp_path: Path) -> None:
    alone = open_store(tmp_path)
    make_run(alone)
    alone.backend.delete("runs/demo-1/stages/data.json")
    assert put(alone, {"a.jsonl": "{}"}, "data")
    lineage = lineage_diagram(alone, "demo-1", {})
    assert "data" not in {arc.source for arc in lineage.arcs}
