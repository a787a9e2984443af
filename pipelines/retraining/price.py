"""What a run would compute anew, and its GPU hours by the times of earlier runs and the recipe's placement."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from components.core.runtime.code_digest import code_digest
from components.core.runtime.placement import Placement
from components.core.runtime.runner import Digests, select_shard_inputs
from components.core.store.store import StageRecord, Store, key_of
from pipelines.recipe.graph import Task
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import Recipe
from pipelines.records.runs import run_records, stage_documents

SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class StagePrice:
    """What a stage of the next run costs.

    Attributes:
        label: its role.
        is_reused: whether the store holds its result.
        seconds: duration when it was last computed, s; None where it never was.
        gpu_hours: what it will take; None where it was never computed and asks for GPUs.
    """

    label: str
    is_reused: bool
    seconds: float | None
    gpu_hours: float | None


def price_run(recipe: Recipe, inputs: Mapping[str, str], store: Store, runs: Sequence[str]) -> list[StagePrice]:
    """The price of each stage.

    Whether a result can be reused depends on libraries and processors of the stage's pod, which this process may not
    have: those of the earlier result are taken. A pod decides for itself, and may find a result that this does not.

    Args:
        recipe: what would run.
        inputs: digests of the artifacts that the recipe names.
        store: holds the records of earlier runs.
        runs: names of earlier runs, newest first.
    """
    earlier = [_records(store, run) for run in runs]
    made: dict[str, dict[str, str]] = {}
    prices = []
    for task in llama_nemotron(recipe).items():
        records = [found[task.label] for found in earlier if task.label in found]
        digests = task.digests(inputs, made)
        reusable = None if digests is None else _reusable(task, digests, records)
        if reusable is not None:
            made[task.label] = reusable.outputs
        seconds = records[0].seconds if records else None
        is_reused = reusable is not None
        prices.append(StagePrice(task.label, is_reused, seconds, _gpu_hours(task.placement, seconds, is_reused)))
    return prices


def spent_gpu_hours(recipe: Recipe, store: Store, run: str) -> float:
    """GPU hours of the stages that were computed in a run."""
    placements = {task.label: task.placement for task in llama_nemotron(recipe).items()}
    computed = [each for each in stage_documents(store, run).values() if not each["cached"]]
    return sum(
        gpu_hours(placements[each["label"]], each["seconds"]) for each in computed if each["label"] in placements
    )


def gpu_hours(placement: Placement, seconds: float) -> float:
    """GPU hours of a stage that holds its nodes for a time."""
    return placement.nodes * placement.gpus * seconds / SECONDS_PER_HOUR


def earlier_runs(store: Store, recipe_name: str, limit: int = 10) -> list[str]:
    """Names of the newest runs of recipes of a name, newest first."""
    names = [str(record["run"]) for record in run_records(store) if record["recipe_name"] == recipe_name]
    return names[::-1][:limit]


def _records(store: Store, run: str) -> dict[str, StageRecord]:
    """Records of the finished stages of a run by label."""

    def found() -> Iterator[tuple[str, StageRecord]]:
        for label, document in stage_documents(store, run).items():
            record = store.stage_record(document["key"])
            if record is not None:
                yield label, record

    return dict(found())


def _reusable(task: Task, inputs: Digests, records: Sequence[StageRecord]) -> StageRecord | None:
    """The first record whose key is that of a task."""
    code, _ = code_digest(task.stage.entry)
    own = select_shard_inputs(task.stage, task.config, inputs)

    def key(record: StageRecord) -> str:
        return key_of(
            stage=task.stage.name,
            code=code,
            libraries=record.libraries,
            config=task.config.canonical(),
            inputs=own,
            device=record.device,
        )

    return next((record for record in records if record.key == key(record)), None)


def _gpu_hours(placement: Placement, seconds: float | None, is_reused: bool) -> float | None:
    """GPU hours of a stage of the next run."""
    if is_reused or not placement.gpus:
        return 0.0
    return None if seconds is None else gpu_hours(placement, seconds)


def price_page(name: str, prices: Sequence[StagePrice], runs: Sequence[str]) -> str:
    """What a recipe would run anew, and its price, as Markdown: for a comment on the change that proposes it.

    Args:
        name: of the recipe.
        prices: of its stages.
        runs: names of the runs that gave the times, newest first.
    """
    anew = [each for each in prices if not each.is_reused]
    unmeasured = [each.label for each in prices if each.gpu_hours is None]
    hours = sum(each.gpu_hours or 0.0 for each in prices)
    source = f"by the times of run `{runs[0]}` and those before it" if runs else "no run has measured this recipe yet"
    lines = [
        f"### Recipe `{name}`: {len(anew)} of {len(prices)} stages run anew, {hours:.3g} GPU hours",
        "",
        "| Stage | Result | Last time | GPU hours |",
        "|---|---|---|---|",
        *map(_row, prices),
        "",
        f"Estimate {source}" + (f"; not measured: {', '.join(unmeasured)}." if unmeasured else "."),
    ]
    return "\n".join(lines) + "\n"


def _row(price: StagePrice) -> str:
    """A row of the page."""
    result = "reused" if price.is_reused else "**anew**"
    last = "" if price.seconds is None else f"{price.seconds / SECONDS_PER_HOUR:.2f} h"
    hours = "not measured" if price.gpu_hours is None else f"{price.gpu_hours:.3g}" if price.gpu_hours else ""
    return f"| {price.label} | {result} | {last} | {hours} |"
