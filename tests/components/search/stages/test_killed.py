"""A library whose process is killed in the middle: the same command goes on, to the same bytes."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
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


Command = Callable[[Path, float], list[str]]
"""The stage with its store in a folder, and the memory that it may take in GiB."""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, parent_folder: Path, corpus: Path) -> Command:
    watched = tmp_path_factory.mktemp("watched")
    config = ImportanceConfig(seq_len=32, batch_size=4, importance_batches=1)
    importance(config, context=quiet_context(watched / "job"), out=watched, parent=parent_folder, corpus=corpus)

    def of(store: Path, memory_gib: float) -> list[str]:
        inputs = (f"parent={parent_folder}", f"corpus={corpus}", f"importance={watched / 'importance'}")
        settings = (*SETTINGS, DISTILLATION, f"placement={{threads: 1, memory_gib: {memory_gib}}}")
        return [
            *(sys.executable, "-m", "pipelines", "stage", "search-library", "--store", str(store)),
            *(part for pair in inputs for part in ("--input", pair)),
            *(part for setting in settings for part in ("--set", setting)),
            *("--output", f"library={store / 'library'}"),
        ]

    return of


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The library of a process that was not killed, with the parent in memory."""
    store = tmp_path_factory.mktemp("whole")
    assert "goes on" not in told(command(store, 8.0))
    return contents(store / "library")


@pytest.mark.parametrize("memory_gib", [8.0, 1e-6], ids=["in memory", "layer by layer"])
def test_a_library_that_is_killed_goes_on(
    tmp_path: Path, command: Command, whole: dict[str, bytes], memory_gib: float
) -> None:
    killed = subprocess.run(
        command(tmp_path, memory_gib),
        env={**os.environ, faults.VARIABLE: "point.named:5=kill"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == 1
    assert "was killed by SIGKILL" in killed.stderr
    assert not (tmp_path / "library").exists()
    goes_on = re.search(
        r"goes on with the block library after (\d+) steps of layers", told(command(tmp_path, memory_gib))
    )
    assert goes_on is not None
    assert int(goes_on[1]) == 5 < NUM_STEPS * SHARD_LAYERS

    assert len(whole) == 3 * SHARD_LAYERS + 1
    assert contents(tmp_path / "library") == whole


def told(command: list[str]) -> str:
    """What a command that succeeds says."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
