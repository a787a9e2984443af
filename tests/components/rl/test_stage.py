"""Reinforcement learning with a real engine, on a model that guesses between two answers."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

from components.core.base import fault_injection as faults
from components.core.base.errors import DataError, InputError
from components.core.model.checkpoint import load_model
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.serving.start_report import STARTING
from components.core.text.toggle_template import OWN
from components.rl.config import RlConfig
from components.rl.curriculum import load_problems, longest_prompt, mixed_modes
from components.rl.stage import run
from tests.components.conftest import Recorder, write_rows
from tests.components.core import tiny_models
from tests.waiting import PATIENCE_S

CONFIG = RlConfig(
    num_steps=8,
    prompts_per_step=4,
    samples_per_prompt=8,
    updates_per_step=1,
    micro_batch_size=16,
    max_tokens=12,
    learning_rate=0.06,
    warmup_steps=0,
    pass_rate_samples=4,
    max_pass_rate=1.0,
    seed=1,
)
SHORT = CONFIG.model_copy(update={"num_steps": 3, "updates_per_step": 2, "warmup_steps": 4, "resume_interval_s": 1e-9})
LOGPROB_TOLERANCE = 1e-4  # nats; engine and learner both compute in float32


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """After its thinking it says 4 or 5, either as likely; its prompts end with the sign of their mode."""
    thinking = ["<on>", "<think>", "2", "+", "</think>"]
    torch.set_num_threads(1)
    return tiny_models.write(
        tiny_models.speaker([*thinking, "4", "<eos>"], [*thinking, "5", "<eos>"]), tmp_path_factory.mktemp("model")
    )


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("problems")
    write_rows(folder / "train.jsonl", ({"id": str(i), "question": f"{i}+{4 - i}=", "answer": "4"} for i in range(5)))
    return folder


def test_problems_below_the_least_level_are_not_drawn(tmp_path):
    write_rows(tmp_path / "train.jsonl", ({"id": str(level), "level": level} for level in range(1, 10)))
    drawn = load_problems(tmp_path, CONFIG.model_copy(update={"min_level": 7}))
    assert sorted(str(row["id"]) for row in drawn) == ["7", "8", "9"]
    assert len(load_problems(tmp_path, CONFIG)) == 9
    with pytest.raises(DataError, match="no training problem has level 10 or above; the highest is 9"):
        load_problems(tmp_path, CONFIG.model_copy(update={"min_level": 10}))


def job_in(folder: Path) -> StageContext:
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    return StageContext(Recorder(), Resume(folder / "resume"), folder / "scratch", Placement(threads=1))


def test_right_answers_become_likely_and_the_learner_agrees_with_the_engine(model, problems, out, tmp_path):
    result = run(CONFIG, context=job_in(tmp_path), out=out, model=model, problems=problems)
    curve = result["curve"]

    assert largest_log_ratio(curve) < LOGPROB_TOLERANCE
    assert {numbers["clipped"] for numbers in curve if "clipped" in numbers} == {0.0}
    assert 0.2 < result["pass_rate_before"] < 0.8
    assert 0.2 < curve[0]["accuracy"] < 0.8
    assert curve[-1]["accuracy"] > 0.9
    assert curve[-1]["reward"] > curve[0]["reward"]
    assert result["quarantine"] == {}
    assert result["steps_without_spread"] == sum(numbers["groups_with_spread"] == 0 for numbers in curve)

    def probability(folder: Path) -> float:
        four, tag = (tiny_models.TOKENS.index(token) for token in ("4", "</think>"))
        with torch.no_grad():
            return float(load_model(folder)(torch.tensor([[tag]])).logits[0, -1].softmax(-1)[four])

    assert probability(model) == pytest.approx(0.5, abs=0.05)
    assert probability(out / "policy") > 0.8
    assert (out / "policy" / "chat_template.jinja").is_file()


def largest_log_ratio(curve: list[dict[str, float]]) -> float:
    return max(numbers["max_log_ratio"] for numbers in curve if "max_log_ratio" in numbers)


@pytest.mark.parametrize("temperature", [0.6, 1.5])
def test_engine_and_learner_agree_at_other_temperatures(model, problems, out, tmp_path, temperature):
    config = SHORT.model_copy(update={"temperature": temperature})
    curve = run(config, context=job_in(tmp_path), out=out, model=model, problems=problems)["curve"]

    assert largest_log_ratio(curve) < LOGPROB_TOLERANCE


def test_a_run_that_never_meets_a_right_answer_says_so_by_the_numbers(model, out, tmp_path):
    write_rows(tmp_path / "train.jsonl", ({"id": str(i), "question": "2+2=", "answer": "7"} for i in range(4)))
    never = {"temperature": 0.1, "start_without_reward": True}  # 4 or 5, never anything else
    context, config = job_in(tmp_path), SHORT.model_copy(update=never)
    result = run(config, context=context, out=out, model=model, problems=tmp_path)
    notes = " ".join(context.reporter.notes)  # type: ignore[attr-defined]

    assert result["pass_rate_before"] == 0.0
    assert result["steps_without_spread"] == SHORT.num_steps
    assert "solves none of 4 problems in 4 answers each: 100% of its answers have the right format, 0% are cut" in notes
    assert "step 1 changes nothing, because the rewards in each group are equal: accuracy 0%, format 100%" in notes
    assert "3 of 3 steps had no spread of rewards in any group; the policy is the incoming model, unchanged" in notes


def test_a_start_without_any_reward_is_refused_with_advice(model, out, tmp_path):
    write_rows(tmp_path / "train.jsonl", ({"id": str(i), "question": "2+2=", "answer": "7"} for i in range(4)))
    config = CONFIG.model_copy(update={"temperature": 0.1})
    with pytest.raises(DataError, match="solves none of 4 problems in 4 answers each: 100% of its") as refused:
        run(config, context=job_in(tmp_path), out=out, model=model, problems=tmp_path)

    assert "rl.start_without_reward=true starts all the same" in str(refused.value.hint)
    assert not list((out / "policy").iterdir())


def test_groups_without_spread_are_replaced(model, problems, out, tmp_path):
    """Two answers that are each right one time in two agree half of the time."""
    config = SHORT.model_copy(
        update={
            "prompts_per_step": 8,
            "samples_per_prompt": 2,
            "dynamic_sampling": 4,
            "num_steps": 1,
            "temperature": 0.3,
        }
    )
    context = job_in(tmp_path)
    result = run(config, context=context, out=out, model=model, problems=problems)
    (numbers,) = result["curve"]
    rates = [e for e in context.reporter.events if e.get("what") == "problems, pass rates"]  # type: ignore[attr-defined]

    assert numbers["groups_sampled"] > config.prompts_per_step
    assert numbers["groups_with_spread"] * numbers["groups_sampled"] == pytest.approx(config.prompts_per_step)
    assert [(event["done"], event["total"]) for event in rates] == [(done, 5) for done in range(6)]
    first = next(e for e in context.reporter.events if e["type"] == "progress")  # type: ignore[attr-defined]
    assert (first["what"], first["done"], first["total"]) == (STARTING, 0, 0)


def test_answers_that_are_cut_off_are_counted_and_can_be_left_out(model, problems, out, tmp_path):
    cut_off = {"max_tokens": 3, "mask_truncated": True, "num_steps": 1, "start_without_reward": True}
    config = SHORT.model_copy(update=cut_off)
    curve = run(config, context=job_in(tmp_path), out=out, model=model, problems=problems)["curve"]

    assert curve[0]["truncated"] == 1.0
    assert "grad_norm" not in curve[0]


def test_the_engine_has_room_for_the_longer_prompts_of_either_mode(model, tmp_path):
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(OWN)
    rows: list[dict[str, object]] = [{"id": "0", "question": "1+1=", "answer": "2"}]
    both = CONFIG.model_copy(update={"thinking_off_fraction": 0.5})

    assert longest_prompt(rows, folder, both) == longest_prompt(rows, folder, CONFIG) + 1  # "off" is one letter longer


@pytest.fixture(scope="module")
def whole(model: Path, problems: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, bytes]:
    """Result and weights of a short run that nothing interrupted; its warm-up is longer than a step."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "out" / "policy").mkdir(parents=True)
    result = run(SHORT, context=job_in(folder), out=folder / "out", model=model, problems=problems)
    return result, (folder / "out" / "policy" / "model.safetensors").read_bytes()


def test_an_interrupted_run_goes_on_to_the_same_curve(model, problems, out, tmp_path, whole):
    given = {"model": model, "problems": problems}
    context = job_in(tmp_path / "parts")
    context.stopping = lambda: True
    with pytest.raises(Interrupted):
        run(SHORT, context=context, out=tmp_path / "none", **given)
    again = job_in(tmp_path / "parts")
    result = run(SHORT, context=again, out=out, **given)

    assert [len(j.reporter.curve("reward")) for j in (context, again)] == [1, 2]  # type: ignore[attr-defined]
    assert (result, (out / "policy" / "model.safetensors").read_bytes()) == whole


def test_a_killed_run_goes_on_to_the_same_bytes(model, problems, out, tmp_path, whole):
    """Sampling repeats in another process, so rollouts need not be kept."""
    command = [sys.executable, __file__, str(model), str(problems), str(tmp_path / "parts")]
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), faults.VARIABLE: "point.trimmed:2=kill"}
    killed = subprocess.run(command, env=environment, capture_output=True, timeout=PATIENCE_S)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    context = job_in(tmp_path / "parts")
    result = run(SHORT, context=context, out=out, model=model, problems=problems)

    assert len(context.reporter.curve("reward")) == 1  # type: ignore[attr-defined]
    assert (result, (out / "policy" / "model.safetensors").read_bytes()) == whole


def test_a_share_of_the_problems_is_asked_with_thinking_off(model):
    rows: list[dict[str, object]] = [{"id": str(i), "question": f"{i}+1=", "answer": str(i + 1)} for i in range(8)]
    config = CONFIG.model_copy(update={"thinking_off_fraction": 0.25})
    problems = mixed_modes(rows, [0, 1, 2, 3, 4, 5, 6, 7], model, config, step=0)

    assert sorted(problem.mode for problem in problems) == ["off"] * 2 + ["on"] * 6
    assert {(p.id, p.expected) for p in problems} == {(str(i), str(i + 1)) for i in range(8)}
    assert mixed_modes(rows, list(range(8)), model, config, step=1) != problems


def test_without_problems_there_is_nothing_to_reinforce(model, out, tmp_path):
    write_rows(tmp_path / "train.jsonl", [])
    with pytest.raises(DataError, match="no training problems"):
        run(CONFIG, context=job_in(tmp_path), out=out, model=model, problems=tmp_path)


def test_several_processes_are_refused(model, problems, out, tmp_path):
    context = job_in(tmp_path)
    context.placement = Placement(processes=2)
    with pytest.raises(InputError, match="one process, not 2"):
        run(CONFIG, context=context, out=out, model=model, problems=problems)


if __name__ == "__main__":
    parts = Path(sys.argv[3])
    run(SHORT, context=job_in(parts), out=parts / "out", model=Path(sys.argv[1]), problems=Path(sys.argv[2]))
