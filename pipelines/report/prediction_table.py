"""What each stage was predicted to take, beside what was measured."""

from dataclasses import dataclass

from components.core.store.store import Store
from pipelines.records.predictions import RunPrediction, StagePrediction, run_prediction
from pipelines.records.runs import stage_documents
from pipelines.report.search_tables import Row, Table
from pipelines.report.summary import format_duration

NOT_PREDICTED, NOT_MEASURED = "not predicted", "not measured"


@dataclass(frozen=True)
class PredictionSection:
    """The section of the page.

    Attributes:
        table: a row a stage; ratios are of the measured to the predicted.
        note: what it was predicted for, or why not.
    """

    table: Table
    note: str


def prediction_section(store: Store, run: str) -> PredictionSection | None:
    """Prediction and measurement of each finished stage of a run; None where no stage has finished."""
    prediction = run_prediction(store, run)
    stages = prediction.stages if prediction else {}
    rows = []
    for label, document in stage_documents(store, run).items():
        record = store.stage_record(document["key"])
        if record is not None:
            cells = _cells(stages.get(label), record.seconds, record.peak_memory_bytes)
            rows.append(Row(label, cells, muted=document["cached"]))
    if not rows:
        return None
    columns = ("stage", "time, predicted", "measured", "ratio", "memory, predicted", "measured", "ratio")
    return PredictionSection(Table("predicted", columns, tuple(rows)), _note(prediction))


def _cells(prediction: StagePrediction | None, seconds: float, memory_bytes: int | None) -> tuple[str, ...]:
    """Times and memory of one stage."""
    predicted_s = prediction.seconds if prediction else None
    predicted_bytes = prediction.memory_bytes if prediction else None
    return (
        NOT_PREDICTED if predicted_s is None else format_duration(predicted_s),
        format_duration(seconds),
        _ratio(seconds, predicted_s),
        NOT_PREDICTED if predicted_bytes is None else _gib(predicted_bytes),
        NOT_MEASURED if memory_bytes is None else _gib(memory_bytes),
        _ratio(memory_bytes, predicted_bytes),
    )


def _ratio(measured: float | None, predicted: float | None) -> str:
    return f"{measured / predicted:.2f}×" if measured is not None and predicted else "–"


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _note(prediction: RunPrediction | None) -> str:
    """What it was predicted for, or why not."""
    if prediction is None:
        return "Nothing was predicted: the parent's shape was not known when the run began."
    if prediction.device is None:
        return "Times are not predicted: that takes a measurement, by tessera plan with this recipe before the run."
    return f"Predicted by tessera plan for {prediction.device}."
