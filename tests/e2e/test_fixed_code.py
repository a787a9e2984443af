"""A stage fails through a bug, its code is fixed, and the same command runs anew what depends on it, nothing else."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import PATIENCE_S

RECIPE = """
name: small
seed: 3
placement: {processes: 1, threads: 1}
data:
  arithmetic: {num_train: 60, num_chats: 20, num_validation: 10, num_test: 10}
parent_pretrain:
  shape: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, intermediate_size: 32}
  num_steps: 1
  global_batch_size: 2
"""
LEFT_OUT = ("sft", "search", "distill", "pretrain", "rl", "eval", "deploy")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of our code, free to be changed."""
    for name in ("components", "pipelines"):
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "tree"


def run(tree: Path, store: Path) -> tuple[int, str, dict[str, bool]]:
    """Run the recipe with a tree's code; returns exit code, complaint, and which stages were cached."""
    recipe = tree / "small.yaml"
    recipe.write_text(RECIPE + "".join(f"{stage}: null\n" for stage in LEFT_OUT))
    command = [sys.executable, "-m", "pipelines", "run", str(recipe), "--run", "small"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment["MLFLOW_TRACKING_URI"] = "http://127.0.0.1:1"  # it would take most of the time, and is away here
    done = subprocess.run(
        [*command, "--store", str(store)], cwd=tree, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    stages = store / "runs" / "small" / "stages"
    cached = {path.stem: json.loads(path.read_text())["cached"] for path in stages.glob("*.json")}
    return done.returncode, done.stderr, cached


def test_only_what_depends_on_the_fixed_code_runs_anew(tree: Path, tmp_path: Path) -> None:
    stage = tree / "components" / "pretrain" / "stage.py"
    right = stage.read_text()
    head, _, body = right.partition('    """')
    stage.write_text(f'{head}    raise ZeroDivisionError("a bug")\n    """{body}')
    code, complaint, cached = run(tree, tmp_path / "store")
    assert (code, cached) == (1, {"data": False})
    assert "stage parent: pretrain stopped: ZeroDivisionError: a bug" in complaint

    stage.write_text(right + "\n# fixed\n")
    code, complaint, cached = run(tree, tmp_path / "store")
    assert (code, complaint, cached) == (0, "", {"data": True, "parent": False})
