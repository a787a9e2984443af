"""What a run is predicted to take, as its report tells it beside what was measured. Measures nothing."""

from collections.abc import Mapping

from components.core.store.store import Store
from pipelines.recipe.schema import Recipe
from pipelines.records.predictions import RunPrediction, StagePrediction, kept_prediction, record_prediction
from pipelines.sizing.machine import Machine
from pipelines.sizing.stage_work import StageWork, recipe_work

UNMEASURED = Machine(processor=None, gpu=None, gpus=0, cores=1, memory_bytes=None)
"""A machine of which nothing is known: it tells memory, which no speed changes."""


def prediction_of(work: Mapping[str, StageWork], device: str | None) -> RunPrediction:
    """Time and memory of each stage; no times where no device is named."""
    return RunPrediction(
        device=device,
        stages={
            label: StagePrediction(seconds=each.seconds if device else None, memory_bytes=each.memory_bytes)
            for label, each in work.items()
        },
    )


def record_run_prediction(store: Store, run: str, recipe: Recipe) -> None:
    """Record what a run that begins is predicted to take.

    It is what the last `tessera plan` of this recipe has told. Where none was made here, memory alone is predicted,
    because times take a measurement.
    """
    prediction = kept_prediction(store, recipe.digest)
    if prediction is None:
        _, work = recipe_work(recipe, UNMEASURED)
        prediction = prediction_of(work, None)
    if prediction.stages:
        record_prediction(store, run, prediction)
