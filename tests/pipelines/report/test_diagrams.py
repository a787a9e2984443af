"""Architecture maps and the lineage diagram."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.core.model.architecture import Architecture, BlockConfig
from components.core.store.store import Store, open_store
from pipelines.records.runs import artifacts
from pipelines.report.diagrams import Cell, Layer, Size, architecture_map, lineage_diagram, model_map, search_maps
from tests.pipelines.made_up_run import LAYERS, SEARCH, make_run, put

PARENT = [Layer(4, 512, (number,)) for number in range(5)]


def drawn(cells: tuple[Cell, ...]) -> list[tuple[int, int, Size, str]]:
    return [(cell.start, cell.span, cell.size, cell.kind) for cell in cells]


def test_a_child_is_laid_out_on_the_columns_of_its_parent() -> None:
    child = [Layer(4, 512, (0,)), Layer(2, 256, (1,)), Layer(0, 640, (2, 4))]
    found = architecture_map("child", "", child, PARENT)
    assert drawn(found.attention) == [
        (1, 1, 4, "own"),
        (2, 1, 2, "smaller"),
        (3, 1, 0, "none"),
        (4, 1, 0, "none"),
        (5, 1, 0, "none"),
    ]
    assert drawn(found.ffn) == [(1, 1, 512, "own"), (2, 1, 256, "smaller"), (3, 3, 640, "fused")]
    assert [cell.share for cell in found.ffn] == [1.0, 0.5, 1.0]
    assert found.ffn[2].title == "layers 2 to 4 in one: 640 FFN channels"


def test_linear_replacements_are_a_kind_of_their_own() -> None:
    found = architecture_map("child", "", [Layer("linear", 512, (0,))], PARENT[:1])
    assert drawn(found.attention) == [(1, 1, "linear", "linear")]
    assert found.attention[0].title == "layer 0: one matrix instead of KV heads"


def test_columns_of_dropped_layers_stay_empty() -> None:
    found = architecture_map("child", "", [Layer(4, 512, (1,)), Layer(4, 512, (3,))], PARENT)
    assert [cell.kind for cell in found.ffn] == ["none", "own", "none", "own", "none"]


@given(st.lists(st.tuples(st.sampled_from((0, 2, 4)), st.sampled_from((0, 128, 512))), min_size=1, max_size=12))
def test_the_cells_of_a_part_cover_every_column_once(sizes: list[tuple[int, int]]) -> None:
    parent = [Layer(4, 512, (number,)) for number in range(len(sizes))]
    layers = [Layer(*size, (number,)) for number, size in enumerate(sizes) if any(size)]
    found = architecture_map("child", "", layers, parent)
    for cells in (found.attention, found.ffn):
        columns = [column for cell in cells for column in range(cell.start, cell.start + cell.span)]
        assert columns == list(range(1, len(sizes) + 1))


def test_the_maps_of_a_search_show_what_it_chose() -> None:
    maps = search_maps(json.loads(SEARCH.model_dump_json()))
    assert set(maps) == {"parent", "chosen", "fused", "greedy", "random"}
    assert {found.columns for found in maps.values()} == {LAYERS}
    assert [cell.size for cell in maps["chosen"].attention] == [
        layer.num_key_value_heads for layer in SEARCH.child.layers
    ]
    fused = [cell for cell in maps["fused"].ffn if cell.kind == "fused"]
    assert [cell.size for cell in fused] == [
        layer.intermediate_size for layer in SEARCH.child.fused_layers if len(layer.parent_layers) > 1
    ]
    assert f"{len(SEARCH.child.fused_layers)} layers" in maps["fused"].note


def test_a_model_without_a_search_is_drawn_by_itself() -> None:
    blocks = tuple(BlockConfig(num_key_value_heads=h, intermediate_size=w) for h, w in ((2, 96), (None, 64)))
    sizes = {"vocab_size": 8, "hidden_size": 8, "num_attention_heads": 2, "head_dim": 4}
    found = model_map("rl", Architecture(family="nemotron-nas", blocks=blocks, **sizes))
    assert drawn(found.attention) == [(1, 1, 2, "own"), (2, 1, 0, "none")]
    assert drawn(found.ffn) == [(1, 1, 96, "own"), (2, 1, 64, "smaller")]


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
