"""A recipe that is a file of a Git repository: one run for one change of it, on real git."""

from typing import Any

import pytest
import yaml

from tests.pipelines.conftest import ONLY_DATA
from tests.pipelines.retraining.site import Site
from tests.pipelines.retraining.world import condition

PATH = "recipes/nano.yaml"
GIT = {"repository": "platform", "path": PATH}


@pytest.fixture
def site(site: Site) -> Site:
    """A cluster whose `Retraining` has its recipe in the platform repository."""
    change_recipe(site)
    site.world.create(recipe={"git": GIT})
    return site


def change_recipe(site: Site, *, note: str = "", **values: Any) -> str:
    """A person's commit to the recipe."""
    text = ONLY_DATA + (yaml.safe_dump(values) if values else "") + (f"# {note}\n" if note else "")
    return site.platform.change("", name=PATH, text=text)


def test_a_commit_that_changes_the_recipe_is_one_run(site: Site) -> None:
    world = site.world
    status = world.step()
    (run,) = world.started
    assert (status.phase, status.run_id) == ("Running", run)
    world.end()
    world.step()
    commit = change_recipe(site, seed=9)
    status = world.step()
    assert len(world.started) == 2
    assert (status.reason, status.recipe_commit) == ("onChange", commit)
    assert world.step(minutes=5) == status
    assert len(world.started) == 2


def test_a_commit_that_changes_no_value_of_the_recipe_is_no_run(site: Site) -> None:
    world = site.world
    run = world.step().run_id
    world.end()
    world.step()
    change_recipe(site, note="a better sentence")
    commit = site.platform.change("", name="serving/other.yaml")
    status = world.step()
    assert (status.phase, status.run_id, status.recipe_commit) == ("Ready", run, commit)
    assert world.started == [run]


def test_an_operator_that_starts_anew_finds_the_run_of_the_recipe(site: Site) -> None:
    """Nothing of the recipe is kept but digests; each step of this world has a fresh memory."""
    world = site.world
    world.change_spec(suspend=True)
    assert world.step().phase == "Suspended"
    world.change_spec(suspend=False)
    first = world.step()
    world.end()
    world.step()
    change_recipe(site, seed=9)
    change_recipe(site)
    assert world.step().phase == "Ready"
    assert world.started == [first.run_id]


@pytest.mark.parametrize(
    ("git", "reason", "words"),
    [
        ({"path": "recipes/absent.yaml"}, "GitError", "check the path"),
        ({"branch": "absent"}, "GitError", "check the branch"),
        ({"repository": "another"}, "InputError", "the operator knows no repository 'another'"),
        ({"path": "README.md"}, "RecipeError", "spec.recipe.git.path"),
    ],
)
def test_a_recipe_that_is_not_there_is_a_condition(site: Site, git: dict[str, str], reason: str, words: str) -> None:
    site.world.change_spec(recipe={"git": GIT | git})
    status = site.world.step()
    assert (status.phase, status.reason, site.world.started) == ("Invalid", reason, [])
    assert words in condition(status, "Ready")[2]


def test_an_outage_of_git_ends_no_run_and_starts_none(site: Site) -> None:
    world = site.world
    run = world.step().run_id
    hidden = site.platform.bare.rename(site.platform.bare.with_suffix(".away"))
    assert world.step(minutes=1).phase == "Running"
    world.end()
    assert world.step().phase == "Ready"
    status = world.step(minutes=1)
    assert (status.phase, condition(status, "Ready")[:2]) == ("Invalid", ("False", "GitError"))
    hidden.rename(site.platform.bare)
    assert world.step(minutes=1).phase == "Ready"
    assert world.started == [run]
