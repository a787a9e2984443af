"""Every model so far, both modes. Source: arXiv 2505.00949, section 7."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

from pydantic import JsonValue

from components.core.architecture import Architecture
from components.core.batches import read_rows
from components.core.errors import DataError, InputError
from components.core.job import Interrupted, Job
from components.core.vllm_server import Launcher, Server
from components.core.vllm_timing import measure_step_ms
from components.eval.asking import SERVED_NAME, Answered, Way, ask_all
from components.eval.config import ROLES, WITH_TOGGLE, EvalConfig
from components.eval.statistics import interval, pass_at_1

SPLITS = ("standard", "hard")
SERVERS_AT_A_TIME = 2

Answers = dict[str, dict[str, list[Answered]]]
"""Split, then way, to the answers of one model."""


def run(config: EvalConfig, *, job: Job, out: Path, problems: Path, **models: Path | None) -> dict[str, JsonValue]:
    """Measure speed with nothing else running, then ask; write `metrics.json` and `answers.jsonl`."""
    given = {role: folder for role in ROLES if (folder := models.get(role)) is not None}
    if not given:
        raise InputError("there is no model to evaluate", hint=f"give at least one of {', '.join(ROLES)}")
    tests = load_tests(problems, config.num_problems)
    architectures = {role: _architecture(folder) for role, folder in given.items()}
    speeds = measured_speeds(config, given, architectures, job)
    answers = Questioning(config, tests, job).ask(given, architectures)
    rows: dict[str, Any] = {}
    for role in given:
        shape = architectures[role]
        rows[_reported(role)] = {
            "parameters": shape.parameters,
            "kv_bytes_per_token": shape.kv_bytes_per_token,
            "tokens_per_second": speeds[shape],
            **scores(answers[role]),
        }
    metrics = {"models": rows, "settings": config.canonical()}
    (out / "metrics" / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    with (out / "metrics" / "answers.jsonl").open("w") as stream:
        for role, split, way, answered in _flat(answers):
            row = {"model": _reported(role), "split": split, "mode": way, **asdict(answered)}
            stream.write(json.dumps(row) + "\n")
    return {"models": {role: row["accuracy"] for role, row in rows.items()}}


def load_tests(problems: Path, limit: int) -> dict[str, list[dict[str, Any]]]:
    """Test problems by split; a split without problems is left out."""
    tests = {split: list(read_rows(problems / f"test-{split}.jsonl"))[:limit] for split in SPLITS}
    tests = {split: rows for split, rows in tests.items() if rows}
    if not tests:
        raise DataError("there are no test problems", hint="give the recipe `rl:` problems with answers")
    return tests


def measured_speeds(
    config: EvalConfig, models: Mapping[str, Path], architectures: Mapping[str, Architecture], job: Job
) -> dict[Architecture, float]:
    """Tokens per second of each architecture, all measured in turn in one go; a batch of requests at a time."""
    folders: dict[Architecture, Path] = {}
    for role, folder in models.items():
        folders.setdefault(architectures[role], folder)
    steps = measure_step_ms(list(folders.values()), config.workload, threads=1)
    batch = config.workload.batch_size
    return {shape: 1000 * batch / statistics.median(times) for shape, times in zip(folders, steps, strict=True)}


class Questioning:
    """Asks all models; one server an architecture, its weights swapped from model to model."""

    def __init__(self, config: EvalConfig, tests: Mapping[str, Sequence[Mapping[str, Any]]], job: Job) -> None:
        self._config, self._tests, self._job = config, tests, job
        self._lock = Lock()
        self._done = self._total = 0

    def ask(self, models: Mapping[str, Path], architectures: Mapping[str, Architecture]) -> dict[str, Answers]:
        """Answers of every model; models that an interrupted run has finished are not asked again."""
        answers = self._saved()
        groups: dict[Architecture, list[str]] = {}
        for role in models:
            if role not in answers:
                groups.setdefault(architectures[role], []).append(role)
        questions = sum(len(rows) for rows in self._tests.values())
        self._total = sum(questions * len(_ways(role)) for roles in groups.values() for role in roles)
        if not groups:
            return answers
        with Launcher() as launcher, ThreadPoolExecutor(SERVERS_AT_A_TIME) as pool:
            largest_first = sorted(groups.values(), key=len, reverse=True)
            ask = [pool.submit(self._ask_group, launcher, roles, models, answers) for roles in largest_first]
            for future in ask:
                future.result()
        return answers

    def _ask_group(
        self, launcher: Launcher, roles: Sequence[str], models: Mapping[str, Path], answers: dict[str, Answers]
    ) -> None:
        """Ask the models of one architecture, one after the other in the same server."""
        folder = models[roles[-1]]  # the last has the chat template of all
        log = self._job.scratch / f"server-{roles[0]}.log"
        prompt_room = 256
        with Server(
            folder,
            name=SERVED_NAME,
            log=log,
            swappable=len(roles) > 1,
            max_model_len=self._max_len(folder, prompt_room),
            max_num_seqs=self._config.concurrency,
            launcher=launcher,
        ) as server:
            for role in roles:
                if self._job.stopping():
                    raise Interrupted
                if len(roles) > 1:
                    server.swap_weights(models[role], version=role)
                found = self._ask_model(server.url, role)
                with self._lock:
                    answers[role] = found
                    self._save(answers)

    def _ask_model(self, url: str, role: str) -> Answers:
        """All splits, all ways of one model."""
        found: Answers = {}
        for split, rows in self._tests.items():
            found[split] = {}
            for way in _ways(role):
                found[split][way] = ask_all(url, rows, way, self._config, self._tick(role))
        return found

    def _tick(self, role: str) -> Callable[[], None]:
        """Counts an answered problem."""

        def tick() -> None:
            with self._lock:
                self._done += 1
                if self._done % 20 == 0 or self._done == self._total:
                    self._job.progress(self._done, self._total, what=role)

        return tick

    def _max_len(self, folder: Path, prompt_room: int) -> int:
        """Room for a prompt and an answer, as far as the model has it."""
        longest = max(len(str(row["question"])) for rows in self._tests.values() for row in rows)
        limit: int = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
        return min(limit, self._config.max_tokens + longest + prompt_room)

    def _saved(self) -> dict[str, Answers]:
        """Answers that an interrupted run has left."""
        point = self._job.resume.latest()
        if point is None:
            return {}
        saved = json.loads((point / "answers.json").read_text())
        return {
            role: {
                split: {way: [_answered(row) for row in rows] for way, rows in ways.items()}
                for split, ways in splits.items()
            }
            for role, splits in saved.items()
        }

    def _save(self, answers: Mapping[str, Answers]) -> None:
        """Keep the answers so far."""
        plain = {
            role: {
                split: {way: [asdict(row) for row in rows] for way, rows in ways.items()}
                for split, ways in splits.items()
            }
            for role, splits in answers.items()
        }
        self._job.resume.save(len(answers), lambda point: _write_json(point / "answers.json", plain))


def scores(answers: Answers) -> dict[str, Any]:
    """Accuracy, interval and format of one model; null where it has no such mode."""
    accuracy: dict[str, Any] = {}
    intervals: dict[str, Any] = {}
    for split in SPLITS:
        ways = answers.get(split, {})
        rights = {mode: [row.right for row in ways.get(mode) or []] for mode in ("on", "off")}
        if "plain" in ways:
            rights["on"] = [row.right for row in ways["plain"]]
        accuracy[split] = {mode: pass_at_1(right) if right else None for mode, right in rights.items()}
        intervals[split] = {mode: list(interval(right)) if right else None for mode, right in rights.items()}
    kept = {
        mode: [ok for ways in answers.values() for row in ways.get(mode, []) for ok in row.kept_format or ()]
        for mode in ("on", "off")
    }
    formats = {mode: sum(values) / len(values) if values else None for mode, values in kept.items()}
    return {"accuracy": accuracy, "interval": intervals, "format": formats}


def _ways(role: str) -> tuple[Way, ...]:
    """How a model is asked."""
    return ("on", "off") if role in WITH_TOGGLE else ("plain",)


def _reported(role: str) -> str:
    """The name of a role in reports."""
    return role.removesuffix("_child")


def _flat(answers: Mapping[str, Answers]) -> list[tuple[str, str, str, Answered]]:
    return [
        (role, split, way, row)
        for role, splits in answers.items()
        for split, ways in splits.items()
        for way, rows in ways.items()
        for row in rows
    ]


def _answered(row: Mapping[str, Any]) -> Answered:
    kept = row["kept_format"]
    return Answered(
        row["id"], row["expected"], tuple(row["texts"]), tuple(row["right"]), None if kept is None else tuple(kept)
    )


def _architecture(folder: Path) -> Architecture:
    return Architecture.from_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
