"""A plan tells what is cached and what is wrong, quickly and without the heavy libraries."""

import json
import subprocess
import sys
from pathlib import Path

from components.core.artifacts import Manifest
from components.core.runner import stage_key
from components.core.store import StageRecord, Store, open_store
from pipelines.llama_nemotron import llama_nemotron
from pipelines.plan import make_plan
from pipelines.recipe import load_recipe

RECIPES = Path(__file__).parents[2] / "pipelines" / "recipes"
PROBE = """
import sys
from pipelines.cli import run_command
code = run_command(["plan", sys.argv[1], "--store", sys.argv[2], "--json"])
heavy = {"torch", "transformers", "vllm", "kfp", "mlflow"}.intersection(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


def test_a_plan_of_the_demo_takes_neither_torch_nor_kfp(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROBE, str(RECIPES / "demo.yaml"), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["faults"] == []
    assert [stage["label"] for stage in plan["stages"]][:2] == ["data", "parent"]
    assert [stage["cached"] for stage in plan["stages"]] == [False, *[None] * 11]


def finish(store: Store, recipe: Path, folder: Path) -> Manifest:
    """Put a result of the data stage into the store, as a run would."""
    task = llama_nemotron(load_recipe(recipe))["data"]
    (folder / "rows").mkdir(parents=True)
    (folder / "rows" / "train.jsonl").write_text("{}\n")
    made = store.put_folder(folder / "rows", "data")
    store.put_stage_record(
        StageRecord(
            key=stage_key(task.stage, task.config, {}),
            stage="data",
            config={},
            code="",
            libraries={},
            inputs={},
            outputs=dict.fromkeys(task.stage.outputs, made.digest),
            result={},
            seconds=1.0,
        )
    )
    return made


def test_a_finished_stage_is_cached_and_the_next_one_has_its_key(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\n")
    store = open_store(str(tmp_path / "store"))
    finish(store, recipe, tmp_path)
    stages = {stage.label: stage for stage in make_plan(load_recipe(recipe), store).stages}
    assert stages["data"].cached is True
    assert stages["parent"].cached is False
    assert stages["parent"].key is not None
    assert stages["search"].cached is None


def test_another_seed_is_another_result(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\n")
    store = open_store(str(tmp_path / "store"))
    finish(store, recipe, tmp_path)
    plan = make_plan(load_recipe(recipe, ["seed=1"]), store)
    assert plan.stages[0].cached is False


def test_a_training_stage_says_how_many_tokens_it_takes(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("distill: {num_steps: 100, global_batch_size: 10, seq_len: 1000}\n")
    plan = make_plan(load_recipe(recipe), open_store(str(tmp_path / "store")))
    assert "1.00 M tokens" in next(stage.needs for stage in plan.stages if stage.label == "distill")
