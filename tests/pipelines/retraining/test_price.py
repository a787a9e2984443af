"""What a changed recipe would run anew: the changed stage and all after it, at the time of the run before."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from components.core.base.config import digest_of
from components.core.runtime.code_digest import code_digest
from components.core.store.store import StageRecord, Store, key_of, open_store, record_path
from pipelines.cli import run_command
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import Recipe
from pipelines.records.runs import begin_run, run_record
from pipelines.retraining.decision import judge_plan
from pipelines.retraining.price import earlier_runs, price_run, spent_gpu_hours
from pipelines.retraining.spec import Budget
from pipelines.retraining.status import Plan, RetrainingStatus
from tests.pipelines.retraining.world import START, condition

SECONDS = {"data": 4.0, "sft": 90.0}


@pytest.fixture(scope="module")
def measured_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one run whose pods had libraries and processors that this machine has not."""
    store, made = open_store(tmp_path_factory.mktemp("store")), dict[str, dict[str, str]]()
    recipe = Recipe(name="demo", seed=7)
    begin_run(store, recipe, {}, "demo-1")
    for task in llama_nemotron(recipe).items():
        key: dict[str, Any] = {
            "stage": task.stage.name,
            "code": code_digest(task.stage.entry)[0],
            "libraries": {"torch": "99"},
            "config": task.config.canonical(),
            "inputs": task.digests({}, made),
            "device": "another",
        }
        made[task.label] = {name: digest_of([task.label, name]) for name in task.stage.outputs}
        seconds = SECONDS.get(task.label, 10.0)
        record = StageRecord(key=key_of(**key), **key, outputs=made[task.label], seconds=seconds)
        store.put_document(record_path(record.key), record.model_dump(mode="json"))
        document = {"label": task.label, "key": record.key, "cached": False, "seconds": seconds, "started": 1.0}
        store.put_document(f"runs/demo-1/stages/{task.label}.json", document)
    return store


AFTER_SFT = {"sft", "rl", "eval", "deploy"}


def changed(store: Store, **values: Any) -> Recipe:
    """The recipe of the made-up run with other values of its SFT, on two nodes of four GPUs."""
    recipe = dict(run_record(store, "demo-1")["recipe"])
    placement = {**recipe["placement"], "gpus": 4, "nodes": 2}
    return Recipe.parse(recipe | {"sft": {**recipe["sft"], **values, "placement": placement}})


def test_an_unchanged_recipe_costs_nothing(measured_store: Store) -> None:
    recipe = Recipe.parse(run_record(measured_store, "demo-1")["recipe"])
    prices = price_run(recipe, run_record(measured_store, "demo-1")["sources"], measured_store, ["demo-1"])
    assert {each.label for each in prices if not each.is_reused} == set()
    assert sum(each.gpu_hours or 0 for each in prices) == 0


def test_a_placement_changes_no_result(measured_store: Store) -> None:
    prices = price_run(changed(measured_store), {}, measured_store, ["demo-1"])
    assert {each.label for each in prices if not each.is_reused} == set()


def test_a_changed_stage_and_those_after_it_run_anew(measured_store: Store) -> None:
    prices = price_run(changed(measured_store, num_steps=7), {}, measured_store, ["demo-1"])
    assert {each.label for each in prices if not each.is_reused} == AFTER_SFT
    hours = {each.label: each.gpu_hours for each in prices}
    assert hours["sft"] == pytest.approx(2 * 4 * 90 / 3600)
    assert hours["rl"] == hours["data"] == 0  # neither asks for a GPU


def test_a_stage_on_gpus_that_no_run_has_measured_has_no_price(measured_store: Store) -> None:
    prices = {each.label: each for each in price_run(changed(measured_store), {}, measured_store, [])}
    assert prices["sft"].gpu_hours is None
    assert prices["data"].gpu_hours == 0


def test_what_a_run_took_leaves_out_what_it_reused(measured_store: Store) -> None:
    assert spent_gpu_hours(changed(measured_store), measured_store, "demo-1") == pytest.approx(0.2)
    path = "runs/demo-1/stages/sft.json"
    document = measured_store.document(path)
    measured_store.put_document(path, document | {"cached": True})
    assert spent_gpu_hours(changed(measured_store), measured_store, "demo-1") == 0
    measured_store.put_document(path, document)
    assert earlier_runs(measured_store, "demo") == ["demo-1"]
    assert earlier_runs(measured_store, "other") == []


def test_the_price_of_a_change_is_printed_as_markdown(
    measured_store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "demo.yaml"
    file.write_text(yaml.safe_dump(changed(measured_store, num_steps=7).canonical()))
    assert run_command(["retrain", "diff", str(file), "--store", measured_store.uri]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("### Recipe `demo`: 4 of ")
    assert "| data | reused |" in shown
    assert "| sft | **anew** |" in shown
    assert "by the times of run `demo-1`" in shown
    other = str(open_store(tmp_path / "empty").uri)
    assert run_command(["retrain", "diff", str(file), "--store", other]) == 0
    assert "not measured: sft." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("budget", "approved", "allowed", "within", "approval"),
    [
        ({}, "", True, ("True", "NoBudget"), "NotNeeded"),
        ({"gpuHours": 100}, "", True, ("True", "WithinBudget"), "NotNeeded"),
        ({"gpuHours": 10}, "", False, ("False", "OverBudget"), "NeedsApproval"),
        ({"gpuHours": 10}, "nano-1", True, ("False", "OverBudget"), "ByAnnotation"),
        ({"gpuHours": 10}, "nano-0", False, ("False", "OverBudget"), "NeedsApproval"),
        ({"gpuHours": 100, "approveAboveGpuHours": 20}, "", False, ("True", "WithinBudget"), "NeedsApproval"),
        ({"approveAboveGpuHours": 40}, "", True, ("True", "NoBudget"), "NotNeeded"),
    ],
    ids=str,
)
def test_a_plan_above_the_budget_waits_for_a_person(
    budget: dict[str, float], approved: str, allowed: bool, within: tuple[str, str], approval: str
) -> None:
    status = RetrainingStatus(plan=Plan(run="nano-1", trigger="onChange", gpu_hours=30))
    assert judge_plan(status, Budget.parse(budget), approved, "-n models nano", START) is allowed
    assert condition(status, "WithinBudget")[:2] == within
    assert condition(status, "Approved")[1] == approval
    if approval == "NeedsApproval":
        words = "30 GPU hours; to run it: kubectl annotate --overwrite retrainings -n models nano"
        assert condition(status, "Approved")[2] == f"{words} tessera.dev/approved=nano-1"
        assert status.phase == "WaitingForApproval"


def test_a_plan_that_was_never_measured_waits_where_there_is_a_budget() -> None:
    plan = Plan(run="nano-1", trigger="onChange", gpu_hours=0, unmeasured=["rl"])
    status = RetrainingStatus(plan=plan)
    assert not judge_plan(status, Budget(gpu_hours=10), "", "", START)
    assert condition(status, "WithinBudget")[0] == "Unknown"
    assert "without rl, which no run has measured" in condition(status, "Approved")[2]
    assert judge_plan(RetrainingStatus(plan=plan), Budget(wall_hours=10), "", "", START)
