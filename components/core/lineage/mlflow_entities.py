"""Contents of the store as MLflow's entities: flat parameters, metrics, data sets, facts about a model."""

import functools
import itertools
import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from components.core.base.errors import CorruptArtifact, StoreError, TesseraError
from components.core.base.flat_values import flatten, numbers
from components.core.model.architecture import Architecture
from components.core.store.manifest import Manifest
from components.core.store.store import Store

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric, Param

Item = TypeVar("Item")

DIGEST_CHARACTERS = 36
"""Longest digest of a data set in MLflow; the whole digest is in its source."""
MAX_FILES = 1000
"""Most files of a data set whose digests are sent to MLflow; `tessera lineage` lists all."""


def params(values: Mapping[str, Any]) -> list["Param"]:
    """Nested settings as MLflow's parameters."""
    from mlflow.entities import Param

    return [Param(name, str(value)) for name, value in flatten(values).items()]


def batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    """The items in lists of at most `size`."""
    return (items[start : start + size] for start in range(0, len(items), size))


def milliseconds(seconds: float) -> int:
    """Unix time in MLflow's unit."""
    return int(seconds * 1000)


def summary_metrics(summary: Mapping[str, Any], at: int) -> list["Metric"]:
    """The numbers of a run's summary, named so that MLflow's comparison of runs groups them by model."""
    from mlflow.entities import Metric

    models = {**summary.get("models", {}), **summary.get("baselines", {})}
    found = {f"{role}/{name}": value for role, model in models.items() for name, value in numbers(model).items()}
    found |= numbers({f"target/{target['name']}": target["value"] for target in summary.get("targets", [])})
    found |= numbers({"seconds": summary.get("seconds")})
    return [Metric(_allowed(name), value, at, 0) for name, value in found.items()]


def dataset_inputs(store: Store, data: Sequence[tuple[str, str]]) -> list["DatasetInput"]:
    """Data sets by name and digest, with their address and the digest of each file."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    return [
        DatasetInput(
            Dataset(
                name,
                digest[:DIGEST_CHARACTERS],
                "tessera",
                json.dumps({"address": address(store, digest), "digest": digest}),
                profile=_files(store, digest),
            ),
            [InputTag("mlflow.data.context", name)],
        )
        for name, digest in data
    ]


def address(store: Store, digest: str) -> str:
    """Address of an artifact, in the form that a recipe accepts."""
    return f"{store.uri}#{digest}"


def manifest_of(store: Store, digest: str) -> Manifest | None:
    """The manifest of an artifact; None where it is damaged or gone, so that lineage continues without its files.

    Raises:
        StoreError: the store cannot be read.
    """
    try:
        return store.manifest(digest)
    except CorruptArtifact:
        return None
    except StoreError:
        if store.backend.stat(f"artifacts/{digest}.json") is None:
            return None
        raise


def kind_of(store: Store, digest: str) -> str | None:
    """The kind of an artifact; None where its manifest is damaged or gone."""
    manifest = manifest_of(store, digest)
    return manifest.kind if manifest else None


def _files(store: Store, digest: str) -> str | None:
    """Number, size and digests of an artifact's files as JSON; digests of the first `MAX_FILES` only."""
    manifest = manifest_of(store, digest)
    if manifest is None:
        return None
    files = manifest.files
    first = {name: entry.sha256 for name, entry in itertools.islice(files.items(), MAX_FILES)}
    return json.dumps({"num_files": len(files), "bytes": sum(e.size for e in files.values()), "sha256": first})


def model_facts(store: Store, digest: str) -> dict[str, str]:
    """Size and shape of a model by its configuration; empty where the configuration is not one of ours."""
    try:
        shape = Architecture.from_config(json.loads(store.read(digest, "config.json")))
    except (TesseraError, ValueError):
        return {}
    return {
        "family": shape.family,
        "parameters": str(shape.parameters),
        "kv_bytes_per_token": str(shape.kv_bytes_per_token),
        "layers": str(len(shape.blocks)),
        "attention_layers": str(sum(block.attends for block in shape.blocks)),
        "ffn_layers": str(sum(block.intermediate_size is not None for block in shape.blocks)),
    }


@functools.cache
def git_commit() -> str | None:
    """The commit that this code was checked out at, with `-dirty` where files differ; None outside a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe"]
    command += ["--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _allowed(name: str) -> str:
    """A metric's name without commas, which MLflow refuses."""
    return name.replace(",", "")
