"""What stages were predicted to take, beside what they took."""

from pathlib import Path

from components.core.store.store import Store, open_store
from pipelines.recipe.schema import Recipe
from pipelines.records.predictions import RunPrediction, record_prediction
from pipelines.records.runs import begin_run
from pipelines.report.prediction_table import prediction_section
from tests.pipelines.made_up_run import PREDICTION, make_run


def rows_of(store: Store) -> dict[str, tuple[str, ...]]:
    found = prediction_section(store, "demo-1")
    assert found is not None
    assert all(len(row.cells) == len(found.table.columns) - 1 for row in found.table.rows)
    return {row.label: row.cells for row in found.table.rows}


def test_ratios_are_of_the_measured_to_the_predicted(made_up_store: Store) -> None:
    parent = rows_of(made_up_store)["parent"]
    assert parent == ("1 min 40 s", "2 min 28 s", "1.48×", "1.00 GiB", "1.50 GiB", "1.50×")


def test_what_was_not_predicted_or_not_measured_is_said(made_up_store: Store) -> None:
    rows = rows_of(made_up_store)
    assert rows["distill"] == ("not predicted", "1 min 06 s", "–", "2.00 GiB", "1.00 GiB", "0.50×")
    assert rows["rl"] == ("not predicted", "1 min 37 s", "–", "not predicted", "2.00 GiB", "–")
    assert rows["deploy"] == ("25.0 s", "20.0 s", "0.80×", "1.00 GiB", "not measured", "–")


def test_the_note_says_for_what_or_why_not(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    make_run(store, cached=True)
    told = prediction_section(store, "demo-1")
    assert told is not None
    assert "for a made-up processor" in told.note
    assert all(row.muted for row in told.table.rows)
    record_prediction(store, "demo-1", RunPrediction(device=None, stages=PREDICTION.stages))
    memory_alone = prediction_section(store, "demo-1")
    assert memory_alone is not None
    assert memory_alone.note.startswith("Times are not predicted")
    store.backend.delete("runs/demo-1/prediction.json")
    nothing = prediction_section(store, "demo-1")
    assert nothing is not None
    assert nothing.note.startswith("Nothing was predicted")
    assert {cell for row in nothing.table.rows for cell in (row.cells[0], row.cells[3])} == {"not predicted"}


def test_a_run_without_finished_stages_has_no_such_section(tmp_path: Path) -> None:
    store = open_store(tmp_path / "store")
    assert prediction_section(store, begin_run(store, Recipe(name="new"), {})) is None
