"""Stage to KFP component: the two lines that a component's body consists of, and the images they run in."""

import functools
import importlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from components.core.base.processes import on_stdin_eof, terminate_gracefully
from components.core.runtime.placement import Placement
from components.core.runtime.runner import Digests, run_stage
from components.core.runtime.stage import Stage
from components.core.store.store import open_store

PARAMETERS = ("config", "label", "store", "run", "sources")
HELD = "TESSERA_HELD"
"""Set where standard input is a pipe that the run of which this task is a part holds open as long as it lives."""
GRACE_S = 60.0
"""Time that stages have to save a resume point when the run ends or is stopped."""


def image(stage: str) -> str:
    """The container image of a stage; `TESSERA_IMAGES` names another registry or prefix when a pipeline is compiled."""
    version = importlib.metadata.version("tessera")
    return f"{os.environ.get('TESSERA_IMAGES', 'tessera')}/{stage}:{version}"


def load_stage(spec: str) -> Stage:
    """The declaration behind `module:name`."""
    module, _, name = spec.partition(":")
    stage: Stage = getattr(importlib.import_module(module), name)
    return stage


def execute(spec: str, values: Mapping[str, Any]) -> None:
    """Run a stage inside a KFP task.

    Args:
        spec: `module:name` of the stage's declaration.
        values: the arguments of the component: `config` (canonical JSON of the stage's configuration, with
        `placement` beside its
            keys), `label`, `store`, `run`, `sources` (JSON, digests of inputs that come from the user's files), and
            KFP artifacts. Arguments that are neither (the item of a fan-out) replace the configuration's value of
            that name.
    """
    if HELD in os.environ:
        on_stdin_eof(functools.partial(terminate_gracefully, GRACE_S))
    stage = load_stage(spec)
    settings = json.loads(values["config"])
    placement = Placement.parse(settings.pop("placement", None) or {})
    own = stage.config.model_fields.keys() - {*PARAMETERS, *stage.inputs, *stage.outputs}
    settings |= {name: values[name] for name in own if name in values}
    store = open_store(values["store"])
    inputs = {**json.loads(values["sources"] or "{}"), **_digests(stage, values)}
    record = run_stage(
        stage,
        stage.config.parse(settings, where=values["label"]),
        inputs,
        store=store,
        label=_label(values["label"], settings),
        run=values["run"],
        placement=placement,
    )
    for name in stage.outputs:
        artifact = values[name]
        digest = record.outputs.get(name, "")
        artifact.metadata.update({"digest": digest, "store": store.uri, "stage_key": record.key})
        Path(artifact.path).parent.mkdir(parents=True, exist_ok=True)
        text = store.manifest(digest).model_dump_json() if digest else "{}"
        Path(artifact.path).write_text(text, encoding="utf-8")


def _digests(stage: Stage, values: Mapping[str, Any]) -> Digests:
    """Digests of the inputs that other tasks made."""
    digests: dict[str, str | list[str]] = {}
    for name in stage.inputs:
        value = values.get(name)
        if isinstance(value, list):
            digests[name] = [artifact.metadata["digest"] for artifact in value]
        elif value is not None and value.metadata.get("digest"):
            digests[name] = value.metadata["digest"]
    return digests


def _label(label: str, settings: Mapping[str, Any]) -> str:
    """The label of one item of a fan-out: `search/library` with shard `0/2` is `search/library-0`."""
    shard = settings.get("shard")
    return f"{label}-{str(shard).partition('/')[0]}" if shard else label
