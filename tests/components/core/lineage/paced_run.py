"""A run of one made-up training stage that takes a step only when the test says so."""

import io
import json
from functools import partial
from pathlib import Path
from time import sleep

from pydantic import JsonValue
from rich.console import Console

from components.core.base.config import Config, digest_of
from components.core.base.errors import DataError
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.placement import Placement
from components.core.runtime.stage import Output, Stage
from components.core.store.store import open_store
from pipelines.recipe.graph import Graph, Made, Task
from pipelines.recipe.registry import STAGES
from pipelines.records import runs
from pipelines.run.local_runner import run_graph

LABEL, NUM_STEPS = "train", 5
ERROR = "the corpus is empty"


class PacedConfig(Config):
    """Where the words come from."""

    words: str
    """Folder with a file for each step that may be taken: `go` or `fail`."""


STAGE = Stage(
    name="paced",
    config=PacedConfig,
    inputs={},
    outputs={"steps": Output("table", "steps.json")},
    entry="tests.components.core.lineage.paced_run:run",
    doc="Wait, and report a loss.",
    source="none",
)


def run(config: PacedConfig, *, context: StageContext, out: Path) -> dict[str, JsonValue]:
    """Report a loss for each step, and save a checkpoint after it."""
    point = context.resume.latest()
    first = 0 if point is None else int((point / "step").read_text())
    for step in range(first + 1, NUM_STEPS + 1):
        word = Path(config.words, str(step))
        while not word.exists():
            if context.stopping():
                raise Interrupted
            sleep(0.02)
        if word.read_text() == "fail":
            raise DataError(f"{ERROR}\nsecond line", hint="mend it")
        context.progress(step, NUM_STEPS, loss=loss(step))
        context.resume.save(step, partial(_save, step))
    (out / "steps" / "steps.json").write_text(json.dumps(NUM_STEPS))
    return {"loss": loss(NUM_STEPS)}


def loss(step: int) -> float:
    """What is reported at a step."""
    return 1 / step


def say(words: Path, *steps: int, word: str = "go") -> None:
    """Let steps be taken."""
    words.mkdir(parents=True, exist_ok=True)
    for step in steps:
        part = words / f"{step}.part"
        part.write_text(word)
        part.rename(words / str(step))


def _save(step: int, point: Path) -> None:
    (point / "step").write_text(str(step))


def run_paced(store_uri: str, name: str, words: str) -> None:
    """Run the stage as a run of its own through the local runner; call it in a process of its own."""
    assert isinstance(STAGES, dict)
    STAGES["paced"] = "tests.components.core.lineage.paced_run:STAGE"
    store, config = open_store(store_uri), PacedConfig(words=words)
    graph = Graph("paced", digest_of(config.canonical()), roles={"steps": Made(LABEL, "steps")})
    graph.tasks.append(Task(LABEL, STAGE, config, Placement(threads=1), {}))
    settings: dict[str, JsonValue] = {LABEL: config.canonical()}
    store.put_document(f"runs/{name}/run.json", {"run": name, **runs._new_record(settings, graph, {})})
    run_graph(store, name, graph, {}, Console(file=io.StringIO()))
