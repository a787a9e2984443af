"""Gate, bundle, running server."""

import json
import shutil
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.chat import has_toggle
from components.core.errors import CheckpointError, StageFailed
from components.core.job import Job
from components.core.vllm_server import Server
from components.deploy.config import DeployConfig
from components.deploy.gate import check
from components.deploy.smoke import SERVED_NAME, converse
from components.deploy.standalone import add_configuration_file


def run(config: DeployConfig, *, job: Job, out: Path, model: Path, metrics: Path | None = None) -> dict[str, Any]:
    """Check the gate, write the bundle, start a server on it and speak to it; the runner's lineage registers it."""
    if not has_toggle(model):
        raise CheckpointError(
            "the model's tokenizer has no toggle: it cannot be told to think", hint="deploy a model from sft or rl"
        )
    checks = check(config.gate, measured(metrics, config.role)) if metrics is not None else []
    passed = all(entry["passed"] for entry in checks)
    if not passed:
        failed = ", ".join(f"{e['check']}={e['threshold']} (found {e['value']})" for e in checks if not e["passed"])
        if config.fail_on_gate:
            raise StageFailed(f"the gate is not passed: {failed}", hint="see the report, or lower deploy.gate")
        job.note(f"the gate is not passed: {failed}; the model is registered as a candidate")
    shutil.copytree(model, out / "bundle", dirs_exist_ok=True, copy_function=shutil.copyfile)
    if config.add_configuration_file:
        add_configuration_file(out / "bundle")
    talks = smoke_test(config, out / "bundle", job)
    return {
        "gate": {"passed": passed, "checks": checks},
        "alias": "champion" if passed else "candidate",
        "registered_model": config.name,
        "smoke": talks,
    }


def measured(metrics: Path, role: str) -> dict[str, Any]:
    """The entry of a model in metrics.json; of the last model where the role is absent."""
    models: dict[str, dict[str, Any]] = json.loads((metrics / "metrics.json").read_text())["models"]
    return models.get(role) or list(models.values())[-1]


def smoke_test(config: DeployConfig, bundle: Path, job: Job) -> list[JsonValue]:
    """Start a server on the bundle and ask every question in both modes.

    Raises:
        StageFailed: a streamed reply differed from the whole one.
    """
    talks: list[JsonValue] = []
    total = 2 * len(config.questions)
    with Server(bundle, name=SERVED_NAME, log=job.scratch / "server.log") as server:
        for question in config.questions:
            for mode in ("on", "off"):
                talk = converse(server.url, question, mode, config.max_tokens)
                if not talk["same_when_streamed"]:
                    raise StageFailed(f"the server streams another reply than it gives whole: {talk}")
                talks.append(talk)
                job.progress(len(talks), total, what="smoke test")
    return talks
