"""What the training stages learn from in seconds: a tokenizer, sums as text, and a place to report to."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from components.core.runtime.context import StageContext
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.text.tokenizer import train_tokenizer

SUMS = [(a, b) for a in range(10) for b in range(10)]


class Recorder:
    """Keeps the events of a job."""

    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []

    def emit(self, event: Mapping[str, object]) -> None:
        self.events.append(event)

    def curve(self, name: str) -> list[float]:
        """One number of every step."""
        return [
            event["metrics"][name] for event in self.events if event["type"] == "progress" and name in event["metrics"]
        ]

    @property
    def notes(self) -> list[str]:
        return [event["text"] for event in self.events if event["type"] == "note"]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def recorded_context(recorder: Recorder, tmp_path: Path) -> StageContext:
    """A job on one thread whose events can be looked at."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return StageContext(recorder, Resume(tmp_path / "resume"), scratch, Placement(threads=1))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a stage writes."""
    for name in ("trained", "distilled", "tuned", "policy"):
        (tmp_path / "out" / name).mkdir(parents=True)
    return tmp_path / "out"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our own tokenizer, trained on sums."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"{a}+{b}={a + b}" for a, b in SUMS], 300, folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus."""
    folder = tmp_path_factory.mktemp("sums")
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.jsonl", ({"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in SUMS))
    return folder


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
