"""The deployment: gate, bundle, smoke test."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.base.errors import CheckpointError, StageFailed
from components.core.runtime.context import Interrupted, StageContext
from components.core.serving.server import Server
from components.core.text.chat import Mode, has_toggle
from components.deploy.bundle import write_bundle
from components.deploy.config import DeployConfig
from components.deploy.gate import check
from components.deploy.smoke import SERVED_NAME, converse

MODES: tuple[Mode, ...] = ("on", "off")


def run(
    config: DeployConfig, *, context: StageContext, out: Path, model: Path, metrics: Path | None = None
) -> dict[str, Any]:
    """Check the model against its gate, write the bundle, and smoke-test it in a running server.

    Raises:
        CheckpointError: the model's chat template has no toggle.
        StageFailed: the gate is not passed and `fail_on_gate` is set, or the server confuses reasoning and answer.
    """
    if not has_toggle(model):
        raise CheckpointError(
            "the model's tokenizer has no toggle between thinking on and off", hint="deploy a model from sft or rl"
        )
    measured = {} if metrics is None else measurements(metrics, config.role)
    checks = check(config.gate, measured)
    passed = bool(measured) and all(entry["passed"] for entry in checks)
    if not passed:
        reason = failed_checks(checks) if measured else "nothing was measured"
        if config.fail_on_gate:
            raise StageFailed(f"the gate is not passed: {reason}", hint="see the report, or lower deploy.gate")
        context.note(f"the gate is not passed: {reason}; the model is registered as a candidate")
    write_bundle(model, out / "bundle", config)
    return {
        "gate": {"passed": passed, "checks": checks},
        "alias": "champion" if passed else "candidate",
        "registered_model": config.name,
        "smoke": smoke_test(config, out / "bundle", context),
    }


def measurements(metrics: Path, role: str) -> dict[str, Any]:
    """Metrics of the model in a role; of the last evaluated model if the role is absent."""
    models: dict[str, dict[str, Any]] = json.loads((metrics / "metrics.json").read_text(encoding="utf-8"))["models"]
    return models.get(role) or list(models.values())[-1]


def failed_checks(checks: Sequence[Mapping[str, Any]]) -> str:
    """The failed checks, for a message."""
    return ", ".join(f"{e['check']}={e['threshold']} (found {e['value']})" for e in checks if not e["passed"])


def smoke_test(config: DeployConfig, bundle: Path, context: StageContext) -> list[dict[str, Any]]:
    """Ask a server of the bundle every question in both modes; returns the transcript."""

    def stop_if_asked(_: float = 0.0) -> None:
        if context.stopping():
            raise Interrupted

    transcript: list[dict[str, Any]] = []
    requests = [(question, mode) for question in config.questions for mode in MODES]
    with Server(bundle, name=SERVED_NAME, log=context.scratch / "server.log", on_wait=stop_if_asked) as server:
        for question, mode in requests:
            stop_if_asked()
            reply = converse(server.url, question, mode, config.max_tokens)
            if not reply["format_ok"]:
                context.note(f"smoke test: thinking {mode}, {question!r} was answered without the format of that mode")
            if not reply["same_when_streamed"]:
                context.note(f"smoke test: thinking {mode}, {question!r} was answered differently when streamed")
            transcript.append(reply)
            context.progress(len(transcript), len(requests), what="smoke test")
    return transcript
