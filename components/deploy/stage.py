"""The deployment: gate, bundle, and a smoke test: questions to a running server, answered complete and streamed."""

from pathlib import Path
from typing import Any

from openai import OpenAI

from components.core.base.errors import CheckpointError, StageFailed
from components.core.runtime.context import Interrupted, StageContext
from components.core.serving.server import Server
from components.core.serving.start_report import server_start
from components.core.text.chat import Mode
from components.core.text.toggle import END_THINK, THINK, has_toggle, system_message
from components.deploy.bundle import write_bundle
from components.deploy.config import DeployConfig
from components.deploy.gate import check, failed_checks, measurements

SERVED_NAME = "model"
TIMEOUT_S = 120.0
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
        context.note(f"the gate is not passed: {reason}")
    write_bundle(model, out / "bundle", config)
    return {
        "gate": {"passed": passed, "checks": checks},
        "alias": "candidate",
        "registered_model": config.name,
        "smoke": smoke_test(config, out / "bundle", context),
    }


def smoke_test(config: DeployConfig, bundle: Path, context: StageContext) -> list[dict[str, Any]]:
    """Ask a server of the bundle every question in both modes; returns the transcript."""
    transcript: list[dict[str, Any]] = []
    requests = [(question, mode) for question in config.questions for mode in MODES]
    log, serving = context.scratch / "server.log", config.serving.on_loopback()
    with Server(bundle, name=SERVED_NAME, log=log, serving=serving, on_wait=server_start(context)) as server:
        for question, mode in requests:
            if context.stopping():
                raise Interrupted
            reply = converse(server.url, question, mode, config.max_tokens)
            if not reply["format_ok"]:
                context.note(f"smoke test: thinking {mode}, {question!r} was answered without the format of that mode")
            if not reply["same_when_streamed"]:
                context.note(f"smoke test: thinking {mode}, {question!r} was answered differently when streamed")
            transcript.append(reply)
            context.progress(len(transcript), len(requests), what="smoke test")
    return transcript


def converse(url: str, question: str, mode: Mode, max_tokens: int) -> dict[str, Any]:
    """Ask one question in one mode, greedily: once for the complete reply, once streamed.

    Returns:
        `question` and `mode`; `reasoning` and `answer` of the complete reply; `streamed`: the same two, joined from the
        deltas; `same_when_streamed`; `format_ok`: with thinking on, reasoning and an answer; with thinking off, an
        answer alone.

    Raises:
        StageFailed: the stream contains a tag as text that the complete reply does not contain.
    """
    with OpenAI(base_url=url, api_key="-", timeout=TIMEOUT_S) as client:
        request: dict[str, Any] = {
            "model": SERVED_NAME,
            "messages": [system_message(mode), {"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "temperature": 0,
        }
        complete = _fields(client.chat.completions.create(**request).choices[0].message)
        streamed = {"reasoning": "", "answer": ""}
        for chunk in client.chat.completions.create(**request, stream=True):
            for choice in chunk.choices:
                for name, text in _fields(choice.delta).items():
                    streamed[name] += text
    for tag in (THINK, END_THINK):
        if tag in "".join(streamed.values()) and tag not in "".join(complete.values()):
            raise StageFailed(f"the server streams {tag} as text: {streamed} instead of {complete}")
    return {
        "question": question,
        "mode": mode,
        **complete,
        "streamed": streamed,
        "same_when_streamed": complete == streamed,
        "format_ok": bool(complete["answer"].strip()) and bool(complete["reasoning"].strip()) == (mode == "on"),
    }


def _fields(message: Any) -> dict[str, str]:
    """Reasoning and answer of a message or delta. The field `reasoning` is vLLM's addition to OpenAI's types."""
    reasoning = (message.model_extra or {}).get("reasoning")
    return {"reasoning": str(reasoning or ""), "answer": message.content or ""}
