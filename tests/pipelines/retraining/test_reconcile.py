"""From triggers to runs: one run for one change, no run that nobody wants, and the story in the status."""

from typing import Any

import pytest

from components.core.store.object_store import ObjectStore
from components.core.store.store import open_object_store
from pipelines.records.runs import run_names, run_record
from pipelines.retraining.spec import APPROVED, NOW
from tests.pipelines.retraining.world import NAME, World, condition

DAILY = {"onChange": False, "schedule": "0 3 * * *"}


def test_a_change_is_one_run_which_is_followed_to_its_end(world: World) -> None:
    world.create()
    status = world.step()
    (run,) = world.started
    assert run.startswith("only-data-")
    assert (status.phase, status.reason, status.run_id) == ("Running", "onChange", run)
    assert condition(status, "Planned")[2] == "1 stages run anew, 0 are reused; 0 GPU hours"
    assert condition(status, "Running") == ("True", "Running", f"run {run}: 0 of 1 stages finished")
    version = world.objects.bodies[NAME]["metadata"]["resourceVersion"]
    assert world.step(minutes=5) == status
    assert world.objects.bodies[NAME]["metadata"]["resourceVersion"] == version  # nothing changed, nothing is written

    world.end()
    status = world.step(minutes=5)
    assert (status.phase, status.reason, status.run_id) == ("Ready", "UpToDate", run)
    assert condition(status, "Succeeded") == ("True", "RunSucceeded", f"run {run}")
    assert [(each.run, each.state, each.trigger) for each in status.runs] == [(run, "Succeeded", "onChange")]
    assert status.last_succeeded == world.now
    world.step(days=30)
    assert world.started == [run]

    world.change_recipe(seed=9)
    assert world.step().run_id != run
    assert len(world.started) == 2


def test_a_run_that_failed_is_not_repeated_until_somebody_or_the_schedule_asks(world: World) -> None:
    world.create(trigger={"schedule": "0 3 * * *"})
    run = world.step().run_id
    world.store.put_document(
        f"runs/{run}/refusals/data.json", {"error": "DataError: train.jsonl:2: no JSON", "retries": 3}
    )
    world.end("FAILED")
    status = world.step()
    assert condition(status, "Succeeded") == ("False", "RunFailed", "DataError: train.jsonl:2: no JSON")
    assert (status.phase, status.reason) == ("Failed", "RunFailed")
    assert world.step(hours=1).phase == "Failed"
    assert world.started == [run]

    world.annotate(NOW, "1")
    assert world.step().reason == "now"
    assert world.started == [run, run]
    world.end("FAILED")
    world.step()
    status = world.step(days=1)
    assert status.reason == "schedule"
    assert world.started == [run, run, run]
    world.end()
    status = world.step()
    assert [each.state for each in status.runs] == ["Succeeded"]


def test_a_schedule_runs_what_has_changed_by_then(world: World) -> None:
    world.create(trigger=DAILY)
    assert world.step().reason == "NoTrigger"
    assert world.step(hours=16).reason == "schedule"  # at 4:00 of the next day
    world.end()
    world.step()
    assert world.step(days=1).phase == "Ready"
    assert len(world.started) == 1  # nothing had changed
    world.change_recipe(seed=9)
    assert world.step(hours=1).phase == "Ready"  # the time of this day has passed
    assert world.step(days=1).reason == "schedule"
    assert len(world.started) == 2


def test_triggers_at_the_same_time_make_one_run(world: World) -> None:
    world.create(trigger={"schedule": "0 3 * * *"})
    world.annotate(NOW, "1")
    world.step(days=1)
    world.end()
    status = world.step()
    assert status.consumed.now == "1"
    assert status.consumed.schedule is not None
    world.step(minutes=1)
    assert len(world.started) == 1


def test_a_person_gets_another_run_although_nothing_has_changed(world: World) -> None:
    world.create()
    first = world.step().run_id
    world.end()
    world.step()
    world.annotate(NOW, "monday")
    world.step()
    assert world.started == [first, f"{first}-2"]
    world.end()
    assert [each.run for each in world.step().runs] == [f"{first}-2", first]
    world.step()
    assert len(world.started) == 2


def test_a_recipe_that_is_as_before_takes_the_run_that_has_succeeded(world: World) -> None:
    world.create()
    first = world.step().run_id
    world.end()
    world.step()
    world.change_recipe(seed=9)
    second = world.step().run_id
    world.end("FAILED")
    world.step()
    world.change_recipe()
    world.step()
    status = world.step()
    assert world.started == [first, second]
    assert [(each.run, each.state) for each in status.runs] == [(first, "Succeeded"), (second, "Failed")]
    assert status.phase == "Ready"


def test_a_plan_without_a_price_waits_for_a_person_who_names_it(world: World) -> None:
    world.create(budget={"gpuHours": 10})
    world.change_recipe(placement={"gpus": 1})
    status = world.step()
    assert (status.phase, status.reason, world.started) == ("WaitingForApproval", "NeedsApproval", [])
    assert status.plan is not None
    assert condition(status, "Approved")[2].endswith(f"{APPROVED}={status.plan.run}")
    world.annotate(APPROVED, "another")
    assert world.step(hours=1).phase == "WaitingForApproval"
    world.annotate(APPROVED, status.plan.run)
    assert world.step().phase == "Running"
    assert world.started == [status.plan.run]
    world.end()
    world.step()
    world.change_recipe(placement={"gpus": 1}, seed=9)
    assert world.step().phase == "WaitingForApproval"  # the word was about one run
    world.change_recipe(placement={"gpus": 1})
    status = world.step()
    assert (status.phase, status.run_id, status.plan) == ("Ready", world.started[0], None)


def test_a_suspended_one_starts_nothing_and_catches_up_afterwards(world: World) -> None:
    world.create(suspend=True, trigger=DAILY)
    assert world.step(days=1).phase == "Suspended"
    assert world.started == []
    world.change_spec(suspend=False)
    assert world.step().reason == "schedule"
    world.change_spec(suspend=True)
    assert world.step().phase == "Running"  # what has started goes on
    world.end()
    assert condition(world.step(), "Succeeded")[0] == "True"


@pytest.mark.parametrize(
    ("recipe", "reason", "words"),
    [
        ("sft: {num_step: 1}", "RecipeError", "did you mean 'num_steps'"),
        ("sft: [", "RecipeError", "YAML"),
        ("corpus: /var/run/secrets/token", "InputError", "the operator reads no files"),
        ("parent: run://no-such-run/child", "InputError", "no-such-run"),
    ],
)
def test_a_wrong_recipe_is_a_condition_with_our_message(world: World, recipe: str, reason: str, words: str) -> None:
    world.create()
    world.objects.config_maps["recipe"] = {"recipe.yaml": recipe}
    status = world.step()
    assert (status.phase, status.reason) == ("Invalid", reason)
    assert words in condition(status, "Ready")[2]
    world.change_recipe()
    assert condition(world.step(), "Ready")[0] == "True"


def test_an_outage_is_a_condition_and_ends_no_run(world: World) -> None:
    world.create()
    run = world.step().run_id
    world.kfp.refuse = 503
    status = world.step()
    assert condition(status, "Ready")[1] == "ClusterError"
    assert (status.phase, status.attempt and status.attempt.run) == ("Running", run)
    world.kfp.refuse = None
    world.end()
    assert world.step().phase == "Ready"


def test_a_run_that_takes_too_long_is_ended(world: World) -> None:
    world.create(budget={"wallHours": 2})
    run = world.step().run_id
    record = run_record(world.store, run)
    world.store.put_document(f"runs/{run}/run.json", record | {"started": world.now.timestamp()})
    assert world.step(hours=1).reason == "onChange"
    assert world.step(hours=2).reason == "WallTimeExceeded"
    status = world.step()
    assert condition(status, "Succeeded")[:2] == ("False", "WallTimeExceeded")
    assert status.runs[0].state == "Stopped"
    assert run_record(world.store, run)["status"] == "interrupted"
    world.step()
    assert world.started == [run]


def test_a_run_that_kubeflow_pipelines_has_lost_has_failed(world: World) -> None:
    world.create()
    world.step()
    world.kfp.runs.clear()
    status = world.step()
    assert condition(status, "Succeeded")[2] == "Kubeflow Pipelines has this run no more"
    world.annotate(NOW, "1")
    assert world.step().phase == "Running"


def test_old_runs_are_forgotten_but_not_the_last_that_succeeded(world: World) -> None:
    world.create(history=2)
    runs = []
    for seed, outcome in enumerate(["SUCCEEDED", "FAILED", "FAILED", "FAILED"]):
        world.change_recipe(seed=seed)
        runs.append(world.step().run_id)
        world.end(outcome)
        status = world.step()
    assert [each.run for each in status.runs] == [runs[3], runs[2], runs[0]]
    assert set(run_names(world.store)) == {runs[0], runs[2], runs[3]}


@pytest.fixture
def corpora(world: World, s3_uri: str) -> ObjectStore:
    folder = open_object_store(f"{s3_uri}/corpora")
    folder.put("a.jsonl", b'{"text": "one"}\n')
    return folder


def with_dataset(world: World, uri: str) -> dict[str, Any]:
    return {"onChange": False, "dataset": {"prefix": f"{uri}/corpora/", "quiet": "1h"}}


def test_a_data_set_is_used_once_it_is_quiet(world: World, corpora: ObjectStore, s3_uri: str) -> None:
    newest = max(each.modified for each in corpora.list(""))
    world.now = world.now.fromtimestamp(newest, world.now.tzinfo)
    world.create(trigger=with_dataset(world, s3_uri))
    assert (world.step().phase, world.step(minutes=50).phase) == ("WaitingForData", "WaitingForData")
    corpora.put("b.jsonl", b'{"text": "two"}\n')
    assert world.step(minutes=5).phase == "WaitingForData"
    assert world.step(minutes=50).phase == "WaitingForData"
    status = world.step(minutes=20)
    assert (status.phase, status.reason) == ("Running", "dataset")
    assert status.dataset is not None
    files = world.store.manifest(status.dataset.artifact).files
    assert sorted(files) == ["a.jsonl", "b.jsonl"]
    recipe = run_record(world.store, status.run_id)["recipe"]
    assert recipe["corpus"] == [status.dataset.artifact]
    world.end()
    world.step()

    corpora.delete("b.jsonl")  # a removal is a change too, and shows in no time of the rest
    assert world.step().phase == "Ready"
    assert world.step(minutes=50).phase == "Ready"
    assert world.step(minutes=20).reason == "dataset"
    assert len(world.started) == 2
