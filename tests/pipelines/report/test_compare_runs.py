"""Comparison of two runs: the numbers of both, their differences, and when they cannot be compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from components.core.lineage.curves import record_curves
from components.core.store.store import Store, open_store
from pipelines.cli import run_command
from pipelines.records.runs import artifact
from pipelines.report.compare_runs import Row, RunComparison, compare_runs
from pipelines.report.report import write_report
from tests.pipelines.made_up_run import MEASURED, SEARCH, make_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = open_store(tmp_path / "store")
    for run in ("demo-1", "demo-2"):
        make_run(store, run)
        record_curves(store, run)
    return store


def set_role(store: Store, run: str, role: str, digest: str) -> None:
    """Replace the artifact that a run has in a role."""
    record = store.document(f"runs/{run}/run.json")
    record["roles"][role] = {"name": f"replaced_{role}"}
    record["sources"][f"replaced_{role}"] = digest
    store.put_document(f"runs/{run}/run.json", record)


def put(store: Store, folder: Path, name: str, text: str) -> str:
    folder.mkdir()
    (folder / name).write_text(text)
    return store.put_folder(folder, "table").digest


def rows(found: RunComparison) -> dict[tuple[str, str], Row]:
    return {(row.role, row.name): row for row in found.rows}


def test_two_equal_runs_have_no_differences(store: Store) -> None:
    found = compare_runs(store, "demo-1", "demo-2")
    assert found.same_budget is True
    assert found.notes == ("The budgets are the same.",)
    assert {row.difference for row in found.rows} == {0.0}
    assert rows(found)["child", "score, nats a token"].values == (SEARCH.child.score, SEARCH.child.score)
    assert rows(found)["rl", "hard problems, thinking on"].values[0] == MEASURED["rl"][1][2]
    assert ("distilled", "KL from its parent in training, nats a token") in rows(found)


def test_differences_are_first_minus_second(store: Store, tmp_path: Path) -> None:
    metrics = json.loads(store.read(artifact(store, "demo-2", "metrics"), "metrics.json"))
    for run, share, interval in (("demo-1", 0.972, [0.96, 1.0]), ("demo-2", 0.9, [0.87, 0.93])):
        metrics["models"]["distilled"]["accuracy"]["standard"]["on"] = share
        metrics["models"]["distilled"]["interval"] = {"standard": {"on": interval}}
        set_role(store, run, "metrics", put(store, tmp_path / run, "metrics.json", json.dumps(metrics)))
    row = rows(compare_runs(store, "demo-1", "demo-2"))["distilled", "standard problems, thinking on"]
    assert row.difference == pytest.approx(0.072)
    assert row.error == pytest.approx((0.02**2 + 0.03**2) ** 0.5)
    assert row.cells() == ("97.2 %", "90.0 %", "+7.2 % ± 3.6 %")


@pytest.mark.parametrize(
    ("limits", "same", "note"),
    [
        ({"latency_ms": 1.01}, True, "The budgets are the same."),
        ({"latency_ms": 1.1}, False, "latency_ms {0:,.6g} against {1:,.6g}"),
        ({"latency_ms": 1.0, "parameters": 5000.0}, False, "parameters without limit against 5,000"),
    ],
)
def test_different_budgets_are_noted(
    store: Store, tmp_path: Path, limits: dict[str, float], same: bool, note: str
) -> None:
    own = SEARCH.limits["latency_ms"]
    other = {**limits, "latency_ms": own * limits["latency_ms"]}
    table = SEARCH.model_copy(update={"limits": other})
    set_role(store, "demo-2", "search", put(store, tmp_path / "table", "search.json", table.model_dump_json()))
    found = compare_runs(store, "demo-1", "demo-2")
    assert found.same_budget is same
    assert note.format(own, other["latency_ms"]) in found.notes[0]


def test_a_second_step_is_noted_and_its_scores_are_not_compared(store: Store) -> None:
    set_role(store, "demo-2", "parent", artifact(store, "demo-1", "distilled"))
    found = compare_runs(store, "demo-1", "demo-2")
    assert found.notes[0] == "demo-2 is a second step: its parent is the distilled model of demo-1."
    by_name = rows(found)
    assert by_name["child", "score, nats a token"].difference is None
    assert by_name["child", "KL from its parent, nats a token"].cells()[2] == ""
    assert by_name["child", "parameters"].difference == 0


def test_a_run_without_search_is_compared_too(store: Store) -> None:
    record = store.document("runs/demo-2/run.json")
    del record["roles"]["search"]
    store.put_document("runs/demo-2/run.json", record)
    found = compare_runs(store, "demo-1", "demo-2")
    assert found.same_budget is None
    assert found.notes == ("Budgets are not known: demo-2 did not search.",)
    assert ("rl", "hard problems, thinking on") in rows(found)


def test_the_command_prints_and_writes_it(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "demo-1", "--compare", "demo-2", "--store", store.uri]
    assert run_command([*arguments, "--json"]) == 0
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert summary["comparison"]["runs"] == ["demo-1", "demo-2"]
    assert summary["run"] == "demo-1"
    assert {"role", "name", "unit", "values", "difference", "error"} == set(summary["comparison"]["rows"][0])
    assert run_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "demo-1 compared with demo-2" in printed
    assert "The budgets are the same." in printed
    comparison = compare_runs(store, "demo-1", "demo-2")
    write_report(store, "demo-1", tmp_path / "report.html", comparison=comparison)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<h2>demo-1 compared with demo-2</h2>" in text
    wanted = "hard problems, thinking on"
    assert text.count(wanted) == sum(row.name == wanted for row in comparison.rows)
    assert run_command(["report", "demo-1", "--compare", "demo-3", "--store", store.uri]) == 2
    assert "no run 'demo-3'" in capsys.readouterr().err


def test_the_former_option_names_the_new_one(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", "demo-1", "--beside", "demo-2", "--store", store.uri]) == 2
    assert "--compare demo-2" in capsys.readouterr().err
