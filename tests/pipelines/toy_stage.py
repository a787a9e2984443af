"""Stages that write down what they really read: each output tells the whole of its own making."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.base.config import Config
from components.core.runtime.context import StageContext
from components.core.runtime.stage import Input, Output, Stage
from components.core.store.manifest import Kind


class ToyConfig(Config):
    """How to make something."""

    seed: int = 1
    """Makes results differ."""
    registered_model: str | None = None
    """Under which name it is deployed."""


def toy_stage(name: str, inputs: dict[str, Kind], outputs: dict[str, Kind]) -> Stage:
    """A stage of a name and a shape."""
    return Stage(
        name=name,
        config=ToyConfig,
        inputs={key: Input(kind, key) for key, kind in inputs.items()},
        outputs={key: Output(kind, key) for key, kind in outputs.items()},
        entry="tests.pipelines.toy_stage:run",
        doc="Write down what is read.",
        source="none",
    )


def run(config: ToyConfig, *, context: StageContext, out: Path, **inputs: Path) -> dict[str, JsonValue]:
    """Write, for each output, every file that was read, with its digest and, of outputs like this, its contents."""
    read = {name: {path.name: _read(path) for path in sorted(folder.iterdir())} for name, folder in inputs.items()}
    context.progress(1, 1, loss=float(config.seed))
    for folder in out.iterdir():
        (folder / "made.json").write_text(json.dumps({"output": folder.name, "seed": config.seed, "read": read}))
    deployed: dict[str, JsonValue] = {"registered_model": config.registered_model, "alias": "champion"}
    return deployed if config.registered_model else {}


def _read(path: Path) -> dict[str, Any]:
    contents = json.loads(path.read_text()) if path.name == "made.json" else None
    return {"sha256": sha256(path.read_bytes()).hexdigest(), "contents": contents}


def files_read(made: dict[str, Any]) -> set[str]:
    """Digests of all files that something was made from, directly or not."""
    found = set()
    for files in made["read"].values():
        for file in files.values():
            found.add(file["sha256"])
            found |= files_read(file["contents"]) if file["contents"] else set()
    return found
