"""Records of runs: names, outcomes, artifacts by role."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from components.core.base.errors import InputError
from components.core.store.store import Store, open_store
from pipelines.recipe.schema import Recipe, load_recipe
from pipelines.records.runs import (
    artifact,
    as_recorded,
    begin_run,
    end_run,
    find_run,
    has_results_of,
    run_names,
    run_record,
)
from tests.pipelines.recipe.test_schema import PARENT

RECIPE = Recipe(name="small")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def test_runs_of_a_recipe_are_numbered(store: Store) -> None:
    assert [begin_run(store, RECIPE, {}) for _ in range(3)] == ["small-1", "small-2", "small-3"]
    assert begin_run(store, Recipe(name="other"), {}) == "other-1"


def test_runs_that_begin_together_get_names_of_their_own(store: Store) -> None:
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda _: begin_run(store, RECIPE, {}), range(8)))
    assert len(set(names)) == 8
    assert run_names(store) == sorted(names)


def test_a_chosen_name_is_taken_up_again_by_the_same_recipe_alone(store: Store) -> None:
    assert begin_run(store, RECIPE, {}, "mine") == "mine"
    assert begin_run(store, RECIPE, {}, "mine") == "mine"
    with pytest.raises(InputError, match="there is a run 'mine' of another recipe"):
        begin_run(store, Recipe(name="small", seed=1), {}, "mine")


def test_a_run_goes_on_where_its_stages_run_elsewhere(store: Store) -> None:
    begin_run(store, RECIPE, {}, "mine")
    placed = {"name": "small", "placement": {"processes": 2}, "sft": {"placement": {"gpus": 4}}}
    assert begin_run(store, Recipe.parse(placed), {}, "mine") == "mine"
    assert run_record(store, "mine")["recipe_digest"] == Recipe.parse(placed).digest


@pytest.mark.parametrize("name", ["../../x", "a/b", "", "latest", "x" * 300, "My run ü 1"])
def test_a_name_that_no_run_can_have_is_refused_before_anything_is_written_or_read(store: Store, name: str) -> None:
    with pytest.raises(InputError, match="no run can be called"):
        begin_run(store, RECIPE, {}, name)
    assert not Path(store.uri).exists()
    with pytest.raises(InputError, match="no run can be called"):
        run_record(store, name)


def test_a_record_below_another_folder_is_no_run(store: Store) -> None:
    begin_run(store, RECIPE, {}, "mine")
    store.put_document("runs/a/b/run.json", {"run": "a/b"})
    assert run_names(store) == ["mine"]


def test_a_run_ends_with_its_outcome_and_time(store: Store) -> None:
    run = begin_run(store, RECIPE, {})
    assert run_record(store, run)["status"] == "running"
    end_run(store, run, "failed")
    record = run_record(store, run)
    assert record["status"] == "failed"
    assert record["seconds"] == pytest.approx(record["finished"] - record["started"])


def test_latest_is_the_run_that_began_last(store: Store) -> None:
    with pytest.raises(InputError, match="no runs in"):
        find_run(store, "latest")
    begin_run(store, Recipe(name="z"), {})
    begin_run(store, Recipe(name="a"), {})
    assert find_run(store, "latest") == "a-1"


def test_a_misspelt_run_or_artifact_is_told_the_nearest(store: Store) -> None:
    begin_run(store, RECIPE, {})
    with pytest.raises(InputError, match="no run 'smal-1'") as caught:
        find_run(store, "smal-1")
    assert caught.value.hint == "did you mean 'small-1'?"
    with pytest.raises(InputError, match="has no artifact 'chld'") as caught:
        artifact(store, "latest", "chld")
    assert caught.value.hint == "did you mean 'child'?"
    with pytest.raises(InputError, match="has not made 'child' yet"):
        artifact(store, "latest", "child")


def test_what_the_user_gave_has_a_role_too(store: Store) -> None:
    begin_run(store, Recipe(name="own", parent="/model"), {"parent": "a" * 64})
    assert artifact(store, "latest", "parent") == "a" * 64


def test_a_run_that_moves_to_a_gpu_goes_on_with_what_was_filled_when_it_began(store: Store, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(PARENT))
    path = tmp_path / "mine.yaml"
    path.write_text("parent: ./model\n")
    begin_run(store, load_recipe(path), {}, "mine")
    moved = load_recipe(path, ["placement.gpus=1"])
    assert not has_results_of(run_record(store, "mine"), moved)
    assert begin_run(store, as_recorded(store, moved, "mine"), {}, "mine") == "mine"
    assert run_record(store, "mine")["recipe"]["placement"]["gpus"] == 1
    assert as_recorded(store, moved, None) == as_recorded(store, moved, "another") == moved
