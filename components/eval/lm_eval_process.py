"""Runs tasks of lm-eval on a served model: a process of its own, which reads a request from its standard input.

lm-eval, and the library that reads its data, decide when they are imported whether they may use the network.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from components.core.base.processes import end_with_owner
from components.core.text.toggle import system_message

BOOTSTRAP_ITERS = 1000
"""Resamples for the standard error of a metric that is no mean."""
GENERATION, ROLLING = "generate_until", "loglikelihood_rolling"
UNFILTERED = "none"

Run = tuple[str, bool, list[str]]
"""Prompt mode, whether a plain prompt begins with the model's first token, and names of tasks."""


def main() -> None:
    """Read a request, run its tasks, and write results and samples to the file that it names."""
    end_with_owner(os.getppid())
    logging.basicConfig(level=logging.WARNING)
    request = json.loads(sys.stdin.read())
    manager = _task_manager(request["tasks"], request["task_files"])
    results: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    for mode, begins, names in _runs(manager, request):
        found = _evaluate(manager, mode, begins, names, request)
        for name, numbers in found["results"].items():
            results.setdefault(name, {})[mode] = _result(found, name, numbers)
        samples += [
            {"task": name, "mode": mode, **sample} for name, rows in found["samples"].items() for sample in rows
        ]
    content = json.dumps({"results": results, "samples": samples}, default=str)
    Path(request["out"]).write_text(content, encoding="utf-8")


def _task_manager(names: Sequence[str], task_files: str | None) -> TaskManager:
    """The definitions of tasks: the user's alone where they are enough, since lm-eval has more than ten thousand."""
    if task_files is None:
        return TaskManager()
    os.chdir(task_files)  # task files name their data by relative paths
    own = TaskManager(include_path=task_files, include_defaults=False)
    return own if set(names) <= set(own.all_tasks) else TaskManager(include_path=task_files)


def _runs(manager: TaskManager, request: Mapping[str, Any]) -> list[Run]:
    """Which tasks are run in which mode.

    In a chat a model can only generate. Where a task needs probabilities, all models continue the plain text.
    """
    by_kind: dict[str, list[str]] = {GENERATION: [], ROLLING: [], "": []}
    for name in request["tasks"]:
        kinds = {task.config.output_type for task in manager.load([name])["tasks"].values()}
        kind = kinds.pop() if len(kinds) == 1 else ""
        by_kind[kind if kind in by_kind else ""].append(name)
    begins = bool(request["begins"])
    runs: list[Run] = [(mode, begins, by_kind[GENERATION]) for mode in request["modes"]]
    # lm-eval itself puts the first token before a text whose whole probability it asks for.
    runs += [("plain", begins, by_kind[""]), ("plain", False, by_kind[ROLLING])]
    return [run for run in runs if run[2]]


def _evaluate(
    manager: TaskManager, mode: str, begins: bool, names: list[str], request: Mapping[str, Any]
) -> dict[str, Any]:
    """What lm-eval returns for some tasks in one mode."""
    settings = {
        "model": request["model"],
        "num_concurrent": request["concurrency"],
        "max_gen_toks": request["max_tokens"],
        "max_length": request["max_model_len"],
        "timeout": request["timeout_s"],
    }
    if mode == "plain":
        kind, path = "local-completions", "completions"
        settings |= {"tokenizer": request["folder"], "tokenizer_backend": "huggingface", "add_bos_token": begins}
    else:
        kind, path = "local-chat-completions", "chat/completions"
    found: dict[str, Any] = simple_evaluate(
        kind,
        {**settings, "base_url": f"{request['url']}/{path}"},
        names,
        limit=request["num_problems"],
        apply_chat_template=mode != "plain",
        system_instruction=system_message(mode)["content"] if mode in ("on", "off") else None,
        task_manager=manager,
        bootstrap_iters=BOOTSTRAP_ITERS,
    )
    return found


def _result(found: Mapping[str, Any], name: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics and standard errors of a task by name of the metric, number of problems, version of the task."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for key, value in numbers.items():
        metric, comma, filtered = key.partition(",")
        if not comma or not isinstance(value, int | float):
            continue
        is_error = metric.endswith("_stderr")
        full = metric.removesuffix("_stderr") + ("" if filtered == UNFILTERED else f"/{filtered}")
        (errors if is_error else metrics)[full] = float(value)
    version = found["versions"].get(name)
    return {
        "metrics": metrics,
        "standard_errors": errors,
        "problems": found["n-samples"].get(name, {}).get("effective"),
        "version": None if version is None else str(version),
    }


if __name__ == "__main__":
    main()
