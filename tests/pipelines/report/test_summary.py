import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.core.store.store import Store, open_store
from pipelines.records.runs import run_record
from pipelines.report.summary import TARGETS, _judge, build_summary, print_summary
from tests.pipelines.made_up_run import MEASURED, SECONDS, make_run

SIZES = {"digest", "parameters", "disk_bytes", "kv_bytes_per_token", "tokens_per_second"}
MODEL_KEYS = {*SIZES, "accuracy", "interval", "format", "gains", "perplexity", "tasks", "tokens_per_second_interval"}


@pytest.fixture(scope="module")
def store(made_up_store: Store) -> Store:
    return made_up_store


def test_the_summary_has_the_promised_shape(store: Store) -> None:
    summary = build_summary(store, "demo-1")
    assert set(summary) == {"run", "seconds", "models", "baselines", "stages", "targets"}
    assert list(summary["models"]) == ["parent", "child", "distilled", "pretrained", "sft", "rl"]
    assert list(summary["baselines"]) == ["random", "greedy"]
    for model in [*summary["models"].values(), *summary["baselines"].values()]:
        assert set(model) == MODEL_KEYS
        for table in (model["accuracy"], model["interval"]):
            assert {split: set(modes) for split, modes in table.items()} == {
                "standard": {"on", "off"},
                "hard": {"on", "off"},
            }
        assert set(model["format"]) == {"on", "off"}
    assert all(set(stage) == {"seconds", "cached", "key"} for stage in summary["stages"].values())


def test_sizes_come_from_the_configuration_of_each_model(store: Store) -> None:
    parent = build_summary(store, "demo-1")["models"]["parent"]
    attention, ffn, norms = 4 * 128 * 128, 3 * 128 * 512, 2 * 128
    assert parent["parameters"] == 2 * 64 * 128 + 12 * (attention + ffn + norms) + 128
    assert parent["kv_bytes_per_token"] == 12 * 2 * 4 * 32 * 2


def test_measurements_come_from_the_evaluation(store: Store) -> None:
    models = build_summary(store, "demo-1")["models"]
    assert models["sft"]["tokens_per_second"] == MEASURED["sft"][0]
    assert models["sft"]["accuracy"]["hard"] == {"on": 0.612, "off": 0.128}
    assert models["parent"]["accuracy"]["hard"] == {"on": 0.604, "off": None}
    assert models["parent"]["format"] == {"on": None, "off": None}


def test_the_tasks_of_the_search_count_as_one_stage(store: Store) -> None:
    stages = build_summary(store, "demo-1")["stages"]
    assert "search/costs" not in stages
    assert stages["search"]["seconds"] == pytest.approx(SECONDS["search/costs"] + 5 * 20.0 + SECONDS["search"])
    assert stages["search"]["key"] == store.document("runs/demo-1/stages/search.json")["key"]
    assert stages["search"]["cached"] is False


def test_the_search_is_cached_only_if_all_its_tasks_were(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    make_run(store, cached=True)
    assert build_summary(store, "demo-1")["stages"]["search"]["cached"] is True
    path = "runs/demo-1/stages/search/library-1.json"
    store.put_document(path, store.document(path) | {"cached": False})
    assert build_summary(store, "demo-1")["stages"]["search"]["cached"] is False


def test_targets_are_the_numbers_worked_out_by_hand(store: Store) -> None:
    values = [target["value"] for target in build_summary(store, "demo-1")["targets"]]
    assert values == pytest.approx([7104 / 3612, 0.972 / 0.988, 0.998, 0.612 - 0.128, 0.668 - 0.612, 0.996])
    assert all(target["met"] for target in build_summary(store, "demo-1")["targets"])


def test_gains_have_the_interval_of_their_paired_differences(store: Store) -> None:
    summary = build_summary(store, "demo-1")
    intervals = [target["interval"] for target in summary["targets"]]
    retained, thinking, rl = (intervals[number] for number in (1, 3, 4))
    assert retained == pytest.approx((0.972 / 0.988 - 0.03, 0.972 / 0.988 + 0.03))
    assert thinking == pytest.approx((0.444, 0.524))
    assert rl == pytest.approx((0.016, 0.096))
    assert [intervals[number] for number in (0, 2, 5)] == [None] * 3
    out = io.StringIO()
    print_summary(summary, Console(file=out, width=120))
    assert "+5.6 points" in out.getvalue()
    assert "95 % interval +1.6 to +9.6" in out.getvalue()
    assert "95 % interval 95.4 to 101.4" in out.getvalue()


def test_metrics_of_earlier_versions_have_values_without_intervals() -> None:
    models = {"sft": {"accuracy": {"hard": {"on": 0.8, "off": 0.6}}, "gains": None}}
    gain = next(target for target in TARGETS if target.title == "Thinking gain")
    assert gain.value(models) == pytest.approx(0.2)
    assert gain.interval(models) is None


def test_where_no_problem_is_hard_all_problems_judge_thinking_and_rl() -> None:
    sft = {"accuracy": {"standard": {"on": 0.5, "off": 0.2}, "hard": {"on": None, "off": None}}}
    interval = {"value": 0.1, "low": 0.05, "high": 0.15}
    rl = {
        "accuracy": {"standard": {"on": 0.6, "off": 0.2}, "hard": {"on": None, "off": None}},
        "gains": {"over": {"sft": {"standard": {"on": interval}, "hard": {"on": None}}}},
    }
    found = {target.title: target for target in TARGETS}
    models: dict[str, Any] = {"sft": sft, "rl": rl}
    assert found["Thinking gain"].value(models) == pytest.approx(0.3)
    assert found["RL gain"].value(models) == pytest.approx(0.1)
    assert found["RL gain"].interval(models) == (0.05, 0.15)


def test_a_difference_of_exactly_the_target_meets_it() -> None:
    hard = {"sft": {"accuracy": {"hard": {"on": 0.80, "off": 0.60}}}, "rl": {"accuracy": {"hard": {"on": 0.83}}}}
    gain, rl_gain = (
        next(target for target in TARGETS if target.title == title) for title in ("Thinking gain", "RL gain")
    )
    assert 0.83 - 0.80 < 0.03  # in floating point
    assert _judge(rl_gain, hard, 0.03)["met"] is True
    assert _judge(gain, hard, 0.2)["met"] is True
    assert _judge(gain, hard, 0.21)["met"] is False


def test_a_recipe_without_targets_has_numbers_without_a_verdict(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    make_run(store)
    record = run_record(store, "demo-1")
    del record["recipe"]["targets"]
    store.put_document("runs/demo-1/run.json", record)
    targets = build_summary(store, "demo-1")["targets"]
    assert targets[0]["value"] == pytest.approx(7104 / 3612)
    assert {(target["target"], target["met"]) for target in targets} == {(None, None)}
    out = io.StringIO()
    print_summary(build_summary(store, "demo-1"), Console(file=out, width=120))
    assert "1.97×" in out.getvalue()
    assert "met" not in out.getvalue()
    assert "missed" not in out.getvalue()


def test_the_size_on_disk_is_that_of_all_files_of_a_model(store: Store) -> None:
    parent = build_summary(store, "demo-1")["models"]["parent"]
    files = [path for path in store.fetch(parent["digest"]).rglob("*") if path.is_file()]
    assert parent["disk_bytes"] == sum(path.stat().st_size for path in files) > 0


def test_a_run_without_evaluation_has_sizes_but_no_numbers(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    make_run(store)
    store.backend.delete("runs/demo-1/stages/eval.json")
    summary = build_summary(store, "demo-1")
    assert summary["models"]["child"]["parameters"] > 0
    assert summary["models"]["child"]["tokens_per_second"] is None
    assert all(target["value"] is None and target["met"] is None for target in summary["targets"])


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal_and_cuts_nothing_off(store: Store, width: int) -> None:
    out = io.StringIO()
    print_summary(build_summary(store, "demo-1"), Console(file=out, width=width))
    assert "…" not in out.getvalue()
    assert "pretrained" in out.getvalue()
    assert ("±" in out.getvalue()) == (width == 120)
