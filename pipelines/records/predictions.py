"""What the stages of a run were predicted to take: kept when a plan is made, recorded when the run begins."""

import contextlib
from pathlib import Path

from pydantic import ValidationError

from components.core.base.config import Config
from components.core.store.store import Store


class StagePrediction(Config):
    """What one stage was predicted to take."""

    seconds: float | None
    """Time; None where the speed of what computes it was not known."""
    memory_bytes: int
    """Peak of one process; of its device, where that is a GPU."""


class RunPrediction(Config):
    """What the stages of a recipe were predicted to take."""

    device: str | None
    """What computes, in words; None where memory alone was predicted, which no device changes."""
    stages: dict[str, StagePrediction]
    """By label."""


def keep_prediction(store: Store, recipe_digest: str, prediction: RunPrediction) -> None:
    """Keep what a plan of a recipe told, on this machine; where nothing can be written, nothing is kept."""
    path = _kept_path(store, recipe_digest)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(prediction.model_dump_json(), encoding="utf-8")


def kept_prediction(store: Store, recipe_digest: str) -> RunPrediction | None:
    """What the last plan of this recipe told on this machine; None where none was made."""
    try:
        return RunPrediction.model_validate_json(_kept_path(store, recipe_digest).read_bytes())
    except (OSError, ValidationError):
        return None


def record_prediction(store: Store, run: str, prediction: RunPrediction) -> None:
    """Record in a run what it is predicted to take."""
    store.put_document(_path(run), prediction.canonical())


def run_prediction(store: Store, run: str) -> RunPrediction | None:
    """What a run was predicted to take; None where nobody predicted it."""
    document = store.read_document_or_none(_path(run))
    return None if document is None else RunPrediction.parse(document)


def _kept_path(store: Store, recipe_digest: str) -> Path:
    return store.local / "plans" / f"{recipe_digest}.json"


def _path(run: str) -> str:
    return f"runs/{run}/prediction.json"
