"""Stages report the metrics that are declared for Prometheus, and every declared metric is reported by a stage."""

import ast
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from components.core.base.metric_names import REPORTED
from components.core.model.checkpoint import model_config, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.training import loop
from components.distill.config import DistillConfig
from components.distill.stage import run as distill
from components.eval.config import HeldOutText
from components.eval.held_out import WHAT, held_out_loss, perplexity
from components.rl.config import RlConfig
from components.rl.grpo import Learner
from components.rl.rollout import Answer, Problem, Reward
from components.rl.stage import mean_scores
from tests.components.conftest import Recorder
from tests.components.core import tiny_models
from tests.reported_metrics import REPORTED_BY, reported

COMPONENTS = Path(__file__).parents[2] / "components"
EXPANDED = {"core/training/loop.py", "eval/held_out.py", "rl/stage.py"}
"""Files that report metrics under names which are not in the call; the tests below run their code."""


def progress_keywords() -> dict[str, set[str | None]]:
    """Names of metrics in calls of `progress`, by file; None where a dictionary is expanded."""
    found: dict[str, set[str | None]] = {}
    for path in COMPONENTS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "progress":
                names = {keyword.arg for keyword in node.keywords} - {"what"}
                found.setdefault(str(path.relative_to(COMPONENTS)), set()).update(names)
    return {path: names for path, names in found.items() if names}


def model_folder(folder: Path, tokenizer: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1, "eos_token_id": 1, "bos_token_id": None}
    config = LlamaConfig(**sizes, **heads)  # type: ignore[arg-type]
    save_model(TesseraForCausalLM(model_config(config.to_dict())), folder, tokenizer=tokenizer)
    return folder


def test_declared_are_the_metrics_of_the_table_below_and_no_others() -> None:
    assert set().union(*REPORTED_BY.values()) == set(REPORTED)
    assert len({metric.name for metric in REPORTED}) == len(REPORTED)


def test_names_in_calls_are_those_of_the_table() -> None:
    found = progress_keywords()
    assert {path for path, names in found.items() if None in names} == EXPANDED
    in_search = {name for path, names in found.items() if path.startswith("search/") for name in names}
    assert in_search == reported("search/library-0", "block library") | reported(
        "search/search", "candidates distilled"
    )
    assert set(found) - EXPANDED == {path for path in found if path.startswith("search/")}


def test_distillation_reports_what_training_does_and_the_terms_of_its_loss(
    tmp_path: Path,
    tokenizer_folder: Path,
    sums: Path,
    out: Path,
    recorded_context: StageContext,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    teacher, student = (model_folder(tmp_path / str(seed), tokenizer_folder, seed) for seed in (0, 1))
    monkeypatch.setattr(loop, "device_name", lambda device: "NVIDIA H100 80GB HBM3")
    config = DistillConfig(num_steps=1, global_batch_size=1, micro_batch_size=1, seq_len=32)
    distill(config, context=recorded_context, out=out, teacher=teacher, student=student, corpus=sums)
    (event,) = (event for event in recorder.events if event["type"] == "progress")
    assert set(event["metrics"]) == reported("distill")
    assert reported("distill") - reported("pretrain") == {"kl", "cosine"}


def test_a_step_of_rl_reports_scores_and_what_the_learner_measures() -> None:
    def answer(tokens: tuple[int, ...], reward: float) -> Answer:
        problem = Problem("p", [7, 8], "4", "on")
        return Answer(problem, tokens, (-1.0,) * len(tokens), 0, False, Reward(reward, reward > 0, True))

    groups = [[answer((9, 10, 1), 1.0), answer((11, 1), 0.0)]]
    learner = Learner(tiny_models.heterogeneous(0), RlConfig(updates_per_step=1))
    assert set(mean_scores(groups) | learner.learn(groups)) == reported("rl")


def test_the_perplexity_of_a_model_comes_once_when_all_text_was_read(
    tmp_path: Path, tokenizer_folder: Path, sums: Path, recorded_context: StageContext, recorder: Recorder
) -> None:
    folder = model_folder(tmp_path / "model", tokenizer_folder, 0)
    config = HeldOutText(seq_len=64, batch_size=1, num_batches=3)
    loss = held_out_loss("sft", folder, sums, config, recorded_context)
    events = [event for event in recorder.events if event["type"] == "progress"]
    assert [event["metrics"] for event in events] == [{}, {}, {"perplexity": perplexity(loss)}]
    assert {event["what"] for event in events} == {f"{WHAT} of sft"}
    assert set(events[-1]["metrics"]) == reported("eval", f"{WHAT} of sft")
