"""A library whose process is killed in the middle: the same command goes on, to the same bytes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from components.core.base import fault_injection as faults
from components.core.runtime.context import quiet_context
from components.search.config import ImportanceConfig
from components.search.stages.library_step import importance

NUM_STEPS, SHARD_LAYERS = 5, 2
SETTINGS = ("shard=0/2", "ffn_fractions=[0.5]", "seq_len=32", "batch_size=4", "seed=1")
# A resume point after each step of a layer, and none that is skipped because the machine is fast.
DISTILLATION = f"distillation={{num_steps: {NUM_STEPS}, resume_interval_s: 1.0e-9}}"


@pytest.fixture
def watched(tmp_path: Path, parent_folder: Path, corpus: Path) -> Path:
    config = ImportanceConfig(seq_len=32, batch_size=4, importance_batches=1)
    importance(config, context=quiet_context(tmp_path / "job"), out=tmp_path, parent=parent_folder, corpus=corpus)
    return tmp_path / "importance"


@pytest.mark.parametrize("memory_gib", [8.0, 1e-6], ids=["in memory", "layer by layer"])
def test_a_library_that_is_killed_goes_on(
    tmp_path: Path, parent_folder: Path, corpus: Path, watched: Path, memory_gib: float
) -> None:
    def command(store: str) -> list[str]:
        inputs = (f"parent={parent_folder}", f"corpus={corpus}", f"importance={watched}")
        settings = (*SETTINGS, DISTILLATION, f"placement={{threads: 1, memory_gib: {memory_gib}}}")
        return [
            *(sys.executable, "-m", "pipelines", "stage", "search-library", "--store", str(tmp_path / store)),
            *(part for pair in inputs for part in ("--input", pair)),
            *(part for setting in settings for part in ("--set", setting)),
            *("--output", f"library={tmp_path / store / 'library'}"),
        ]

    def told(store: str) -> str:
        done = subprocess.run(command(store), capture_output=True, text=True, check=True)
        return done.stdout

    killed = subprocess.run(
        command("killed"),
        env={**os.environ, faults.VARIABLE: "point.named:5=kill"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == 1
    assert "was killed by SIGKILL" in killed.stderr
    assert not (tmp_path / "killed" / "library").exists()
    goes_on = re.search(r"goes on with the block library after (\d+) steps of layers", told("killed"))
    assert goes_on is not None
    assert int(goes_on[1]) == 5 < NUM_STEPS * SHARD_LAYERS

    assert "goes on" not in told("whole")
    written = {store: contents(tmp_path / store / "library") for store in ("killed", "whole")}
    assert len(written["whole"]) == 3 * SHARD_LAYERS + 1
    assert written["killed"] == written["whole"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
