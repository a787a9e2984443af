"""What a stage shows in the interface of Kubeflow Pipelines: scalar metrics, a summary as a page, the models it made.

KFP's launcher hands a container its executor input, a JSON document with an address for each artifact that the
component declares. The container writes the file of an artifact to the local folder that stands for the address, and
its metadata to one more file, the executor output. Digests of outputs are parameters and no part of this.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from components.core.base.config import canonical_json
from components.core.base.errors import RecipeError, TesseraError
from components.core.base.flat_values import flatten, numbers
from components.core.model.architecture import Architecture
from components.core.runtime.stage import Stage
from components.core.store.store import StageRecord, Store

METRICS, SUMMARY, REPORT = "stage_metrics", "stage_summary", "report"
"""Names of artifacts; outputs of stages have other names."""
BUCKETS = {"minio": "minio", "s3": "s3", "gs": "gcs"}
"""Folder below the root that the launcher copies to a bucket, by the scheme of an artifact's address."""
TERMINATION_LOG = Path("/dev/termination-log")
"""File of a container whose text Kubernetes puts into the pod's status, and Argo into the message of the task."""
MAX_TERMINATION_BYTES = 2000
"""Kubernetes takes 4096 bytes of all containers together."""
NO_CELL = re.compile(r"[|<>\s]+")
"""Characters that would break a table."""
MAX_CELL_CHARACTERS = 500

Artifact = dict[str, Any]


class ExecutorInput:
    """The artifacts that a component declares, and where their files and metadata go.

    Args:
        text: the executor input, JSON.
        root: folder below which the launcher's folders of buckets are.

    Raises:
        RecipeError: the text is no executor input.
    """

    def __init__(self, text: str, root: Path = Path("/")) -> None:
        try:
            outputs = json.loads(text)["outputs"]
            self._output_file = Path(outputs["outputFile"])
            declared = outputs.get("artifacts", {}).items()
            self._artifacts: dict[str, Artifact] = {name: several["artifacts"][0] for name, several in declared}
        except (ValueError, LookupError, TypeError) as error:
            raise RecipeError(f"--executor-input is no executor input of KFP: {error!r}") from None
        self._root = root
        self._written: dict[str, Artifact] = {}

    def put(self, name: str, metadata: Mapping[str, Any], text: str | None = None) -> None:
        """Set the metadata of an artifact, and write its file where there is one; nothing where it is not declared."""
        artifact = self._artifacts.get(name)
        if artifact is None:
            return
        if text is not None:
            path = self._local_path(artifact["uri"])
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        own: Artifact = {key: artifact[key] for key in ("name", "type", "uri") if key in artifact}
        self._written[name] = {**own, "metadata": {**artifact.get("metadata", {}), **metadata}}

    def close(self) -> None:
        """Write the executor output: the metadata of every artifact that was put."""
        self._output_file.parent.mkdir(parents=True, exist_ok=True)
        artifacts = {name: {"artifacts": [artifact]} for name, artifact in self._written.items()}
        self._output_file.write_text(json.dumps({"artifacts": artifacts}), encoding="utf-8")

    def _local_path(self, uri: str) -> Path:
        """The file that the launcher copies to an address."""
        scheme, _, location = uri.partition("://")
        return self._root / BUCKETS.get(scheme, scheme) / location


def model_artifact(output: str) -> str:
    """Name of the KFP artifact of a model that a stage makes."""
    return f"{output}_model"


def show_stage(
    executor_input: ExecutorInput, stage: Stage, record: StageRecord, store: Store, label: str, tracking_uri: str | None
) -> None:
    """Show a finished stage in KFP's interface.

    Args:
        executor_input: takes the artifacts.
        stage: the stage's declaration.
        record: the record of the computation.
        store: holds the outputs.
        label: the role of the stage in the run.
        tracking_uri: address of MLflow, None where there is none.
    """
    metrics = {name: value for name, value in numbers(record.result).items() if math.isfinite(value)}
    executor_input.put(METRICS, {**metrics, "seconds": record.seconds})
    executor_input.put(SUMMARY, {}, "\n".join(_summary(stage, record, store, label, tracking_uri)) + "\n")
    for name, digest in record.outputs.items():
        if stage.outputs[name].kind == "model":
            facts = _model_facts(store, digest) | {"digest": digest, "address": f"{store.uri}#{digest}"}
            facts |= {"stage_key": record.key} | ({"mlflow": tracking_uri} if tracking_uri else {})
            executor_input.put(model_artifact(name), facts, canonical_json(facts))
    executor_input.close()


def write_failure(error: TesseraError, path: Path = TERMINATION_LOG) -> None:
    """Write an error where Kubernetes and Argo take the message of a failed container from; nothing outside a pod."""
    if path.exists() and os.access(path, os.W_OK):
        text = f"{type(error).__name__}: {error}".encode()[:MAX_TERMINATION_BYTES]
        path.write_text(text.decode(errors="ignore"), encoding="utf-8")


def _summary(stage: Stage, record: StageRecord, store: Store, label: str, tracking_uri: str | None) -> Iterator[str]:
    """Lines of the page, in Markdown."""
    yield from (f"# {label}", "", stage.doc, "")
    yield from _table("result", record.result)
    yield from _table("output", {name: f"{store.uri}#{digest}" for name, digest in record.outputs.items()})
    yield from _table("input", record.inputs)
    places = {"stage key": record.key, "seconds": round(record.seconds, 1), "device": record.device}
    yield from _table("computation", places | {"MLflow": tracking_uri})
    yield from _table("setting", record.config)


def _table(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """A table of names and values; nothing without values."""
    rows = {name: value for name, value in flatten(values).items() if value is not None}
    if rows:
        yield from (f"| {title} | |", "| --- | --- |")
        for name, value in rows.items():
            shown = f"{value:.6g}" if isinstance(value, float) else str(value)
            yield f"| {name} | {NO_CELL.sub(' ', shown)[:MAX_CELL_CHARACTERS]} |"
        yield ""


def _model_facts(store: Store, digest: str) -> dict[str, int]:
    """Size of a model; empty where its configuration is not one of ours."""
    try:
        shape = Architecture.from_config(json.loads(store.read(digest, "config.json")))
    except (TesseraError, ValueError):
        return {}
    return {"parameters": shape.parameters, "layers": len(shape.blocks)}
