"""Accuracy, format and speed of every model so far, in both modes. Source: arXiv 2505.00949, section 7."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.base.errors import CheckpointError, DataError, InputError
from components.core.model.architecture import Architecture
from components.core.model.inspection import StoredDtype, read_architecture, stored_dtype
from components.core.runtime.context import StageContext
from components.core.serving.load_profile import LoadProfile, Workload
from components.core.serving.timing import TimingReport, measure_step_ms, relative_error
from components.core.text.toggle import has_toggle
from components.eval.answer_rows import ungraded, write_answers
from components.eval.answers import EvalCheckpoint, load_problems
from components.eval.config import ROLES, WITH_TOGGLE, EvalConfig
from components.eval.gains import gains, values_and_bounds
from components.eval.held_out import measure_losses, perplexity
from components.eval.replicas import Replicas
from components.eval.scores import scores
from components.eval.serving import EvalRunner
from components.eval.tasks import require_lm_eval

SPEEDS = "tokens per second"
"""What progress calls the measurement of speed."""
MAX_SPEED_ERROR = 0.015
"""Half the width of the interval of a speed, as a fraction of it, up to which rounds are repeated: 3 % in all."""


def run(
    config: EvalConfig,
    *,
    context: StageContext,
    out: Path,
    problems: Path | None = None,
    corpus: Path | None = None,
    task_files: Path | None = None,
    **models: Path | None,
) -> dict[str, JsonValue]:
    """Measure speed and perplexity while nothing else runs, then ask the models; write metrics and answers.

    Where the stage runs as several ranks, each is a replica with servers of its own. The first measures speed, and
    writes the outputs; the held-out text and the problems are shared out.
    """
    replicas = Replicas.of_ranks()
    evaluated = {role: folder for role in ROLES if (folder := models.get(role)) is not None}
    check_models(evaluated)
    if config.tasks:
        require_lm_eval()
    test_problems = load_problems(problems, config.num_problems) if problems else []
    has_text = corpus is not None and has_rows(corpus / "validation.jsonl")
    if not test_problems and not has_text and not config.tasks:
        raise DataError(
            "there is nothing to evaluate the models on: neither test problems nor held-out text nor tasks",
            hint="give the recipe `rl:` problems with answers, a `corpus:`, or `eval.tasks`",
        )
    checkpoint = EvalCheckpoint.latest(context.resume)
    if not checkpoint.speeds:
        measured = measure_speeds(evaluated, config, context) if replicas.is_first else {}
        checkpoint.speeds = replicas.exchange(measured)[0]
        if replicas.is_first:
            checkpoint.save(context.resume)
    if corpus is not None and has_text:
        measure_losses(evaluated, corpus, config.held_out, context, checkpoint, replicas)
    if test_problems or config.tasks:
        EvalRunner(config, test_problems, context, checkpoint, replicas, task_files).ask(evaluated)
    else:
        context.note("there are no test problems: models are compared by their perplexity on held-out text")
    if not replicas.is_first:
        return {}
    metrics = {**_metrics(evaluated, checkpoint, context), "settings": config.canonical()}
    if config.tasks:
        metrics["lm_eval"] = version("lm-eval")
    (out / "metrics" / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    if config.tasks:
        samples = (
            json.dumps({"model": report_name(role), **sample}) + "\n"
            for role in evaluated
            for sample in checkpoint.tasks[role].samples
        )
        (out / "metrics" / "task_samples.jsonl").write_text("".join(samples), encoding="utf-8")
    write_answers(
        out / "metrics" / "answers.jsonl",
        (
            row.model_copy(update={"model": report_name(role)})
            for role in evaluated
            for row in checkpoint.answers.get(role, ())
        ),
    )
    return {
        "models": {role: row["accuracy"] for role, row in metrics["models"].items()},
        "gains": values_and_bounds({role: row["gains"] for role, row in metrics["models"].items()}),
        "perplexity": {role: row["perplexity"] for role, row in metrics["models"].items()},
        **({"tasks": {role: row["tasks"] for role, row in metrics["models"].items()}} if config.tasks else {}),
    }


def has_rows(file: Path) -> bool:
    """Whether a JSONL file exists and is not empty."""
    return file.is_file() and file.stat().st_size > 0


def _metrics(models: Mapping[str, Path], checkpoint: EvalCheckpoint, context: StageContext) -> dict[str, Any]:
    """The measurements of each model, and the problems that count for none because answers could not be graded."""
    quarantine = ungraded(row for role in models for row in checkpoint.answers.get(role, ()))
    if quarantine:
        (split, problem), reason = next(iter(quarantine.items()))
        context.note(
            f"{len(quarantine)} problems count for no model, because answers to them could not be graded; "
            f"{problem} of test-{split}: {reason}"
        )
    graded = {
        role: [row for row in checkpoint.answers.get(role, ()) if (row.split, row.id) not in quarantine]
        for role in models
    }
    compared = gains({report_name(role): answers for role, answers in graded.items()})
    rows = {}
    for role, folder in models.items():
        loss = checkpoint.losses.get(role)
        rows[report_name(role)] = {
            **size(folder),
            **checkpoint.speeds[role],
            "held_out_loss": loss,
            "perplexity": None if loss is None else perplexity(loss),
            **scores(graded[role]),
            "gains": compared[report_name(role)],
            "tasks": checkpoint.tasks[role].results if role in checkpoint.tasks else {},
        }
    metrics: dict[str, Any] = {"models": rows}
    if quarantine:
        metrics["quarantine"] = [
            {"split": split, "id": problem, "reason": reason} for (split, problem), reason in quarantine.items()
        ]
    return metrics


def check_models(models: Mapping[str, Path]) -> None:
    """Check that there is a model, and that models which should have both modes have the toggle.

    Raises:
        InputError: there is no model.
        CheckpointError: the chat template of a model from sft or rl has no toggle.
    """
    if not models:
        raise InputError("there is no model to evaluate", hint=f"give at least one of {', '.join(ROLES)}")
    for role in WITH_TOGGLE:
        if role in models and not has_toggle(models[role]):
            raise CheckpointError(
                f"the tokenizer of {role} has no toggle between thinking on and off",
                hint="give a model from the stage sft or rl, or evaluate it as `pretrained`",
            )


def measure_speeds(
    models: Mapping[str, Path], config: EvalConfig, context: StageContext
) -> dict[str, dict[str, float | list[float] | None]]:
    """Tokens per second of each model, with a 95 % interval.

    Of models with the same architecture and precision only the first is measured. Rounds are repeated until the
    intervals are narrow.
    """
    serving, workload = config.serving, config.workload
    load = LoadProfile(**workload.model_dump(), dtype=serving.dtype, tensor_parallel=serving.tensor_parallel)
    kinds = {role: (read_architecture(folder).without_gaps(), stored_dtype(folder)) for role, folder in models.items()}
    first: dict[tuple[Architecture, StoredDtype], Path] = {}
    for role, folder in models.items():
        first.setdefault(kinds[role], folder)
    context.progress(0, len(first), SPEEDS)
    memory_gib = context.placement.memory_gib
    report = TimingReport.to_context(context, SPEEDS)
    steps_ms = measure_step_ms(list(first.values()), load, serving.threads, memory_gib, MAX_SPEED_ERROR, report)
    worst = max(map(relative_error, steps_ms))
    if MAX_SPEED_ERROR < worst < math.inf:
        context.note(
            f"tokens per second are known to ±{100 * worst:.0f} % after {len(steps_ms[0])} rounds, not to "
            f"±{100 * MAX_SPEED_ERROR:.0f} %: the machine did other work, or eval.workload.rounds is small"
        )
    speeds = dict(zip(first, (_speed(times, workload) for times in steps_ms), strict=True))
    return {role: speeds[kind] for role, kind in kinds.items()}


def size(folder: Path) -> dict[str, Any]:
    """Size of a model and of its KV cache, from its configuration."""
    architecture = read_architecture(folder)
    return {"parameters": architecture.parameters, "kv_bytes_per_token": architecture.kv_bytes_per_token}


def report_name(role: str) -> str:
    """The name of a role in reports."""
    return role.removesuffix("_child")


def _speed(steps_ms: Sequence[float], workload: Workload) -> dict[str, float | list[float] | None]:
    """Tokens per second with their interval: each step generates one token for each request of the batch."""
    speed, error = 1000 * workload.batch_size / statistics.median(steps_ms), relative_error(steps_ms)
    interval = None if error == math.inf else [speed / (1 + error), speed * (1 + error)]
    return {"tokens_per_second": speed, "tokens_per_second_interval": interval}
