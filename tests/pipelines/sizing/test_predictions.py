"""A run records what its plan has told; without a plan, what takes no measurement."""

from pathlib import Path

import pytest

from components.core.store.store import Store, open_store
from pipelines.recipe.schema import Recipe, load_recipe
from pipelines.records.predictions import RunPrediction, kept_prediction, run_prediction
from pipelines.records.runs import begin_run
from pipelines.run.plan import make_plan
from pipelines.sizing.machine import named_machine
from pipelines.sizing.predictions import record_run_prediction

RECIPES = Path(__file__).parents[3] / "pipelines" / "recipes"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


def recorded(store: Store, recipe: Recipe) -> RunPrediction | None:
    """What a run of a recipe that begins now records."""
    run = begin_run(store, recipe, {})
    record_run_prediction(store, run, recipe)
    return run_prediction(store, run)


def test_without_a_plan_memory_alone_is_predicted(store: Store) -> None:
    found = recorded(store, load_recipe(RECIPES / "demo.yaml"))
    assert found is not None
    assert found.device is None
    assert {stage.seconds for stage in found.stages.values()} == {None}
    assert all(stage.memory_bytes > 0 for stage in found.stages.values())


def test_a_run_records_what_its_plan_has_told(store: Store) -> None:
    recipe = load_recipe(RECIPES / "demo.yaml")
    without_plan = recorded(store, recipe)
    plan = make_plan(recipe, store, lambda: named_machine("CPU:2"))
    assert plan.prediction is not None
    told = recorded(store, recipe)
    assert told is not None
    assert without_plan is not None
    assert told.device == "CPU"
    assert {label: stage.seconds for label, stage in told.stages.items()} == {
        label: work.seconds for label, work in plan.prediction.work.items()
    }
    for label, stage in told.stages.items():
        assert stage.memory_bytes == without_plan.stages[label].memory_bytes
    changed = recorded(store, load_recipe(RECIPES / "demo.yaml", ["seed=8"]))
    assert changed is not None
    assert changed.device is None


def test_nothing_is_predicted_of_a_parent_that_only_the_store_knows(store: Store) -> None:
    assert recorded(store, load_recipe(RECIPES / "two-step.yaml")) is None


def test_a_kept_prediction_that_was_damaged_is_none(store: Store) -> None:
    assert kept_prediction(store, "0" * 64) is None
    (store.local / "plans").mkdir(parents=True)
    (store.local / "plans" / f"{'0' * 64}.json").write_text('{"device": 1}')
    assert kept_prediction(store, "0" * 64) is None
