"""Reinforcement learning with verifiable rewards. Source: arXiv 2505.00949, section 5."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from components.core.base.errors import DataError, InputError
from components.core.model.checkpoint import load_model, save_model
from components.core.runtime.context import Interrupted, StageContext
from components.core.serving.engine import Engine
from components.core.text.chat import prompt_ids
from components.core.text.packing import eos_token_id, read_rows
from components.core.training.checkpoints import load_point, save_point
from components.rl.config import RlConfig
from components.rl.curriculum import order_problems
from components.rl.learner import Learner
from components.rl.reward import Environment
from components.rl.rollout import Answer, Problem, check_weight_version, roll_out


@dataclass
class RlState:
    """What a run goes on from, besides weights and optimizer; saved with each resume point.

    Attributes:
        pass_rate: mean pass rate of the incoming model.
        batches: problem numbers of each step, in the curriculum's order.
        curve: numbers of each step so far.
        updates: optimizer steps so far.
        quarantine: problems whose judge failed, and why.
    """

    pass_rate: float
    batches: list[list[int]]
    curve: list[dict[str, float]] = field(default_factory=list)
    updates: int = 0
    quarantine: dict[str, str] = field(default_factory=dict)


def run(config: RlConfig, *, context: StageContext, out: Path, model: Path, problems: Path) -> dict[str, Any]:
    """Measure pass rates, plan the curriculum, then roll out and learn in turn; vLLM and learner share the process."""
    if context.placement.processes > 1:
        raise InputError(
            f"rl runs as one process, not {context.placement.processes}", hint="set rl.placement.processes to 1"
        )
    torch.manual_seed(config.seed or 0)
    rows = load_problems(problems, config)
    policy = load_model(model)
    learner = Learner(policy, config)
    found = load_point(context, policy, learner.optimizer)
    asked = ask(rows, model, "on")
    with Engine(
        model,
        max_model_len=config.max_tokens + max(len(problem.prompt_ids) for problem in asked),
        max_num_seqs=config.prompts_per_step * config.samples_per_prompt,
        seed=config.seed or 0,
    ) as engine:
        rollouts = Rollouts(engine, model, config, context)
        if found:
            state = RlState(**found[1])
            learner.num_updates = state.updates
            rollouts.environment.quarantine |= state.quarantine
            engine.update_weights(policy.named_parameters(), version=len(state.curve))
        else:
            state = RlState(*rollouts.curriculum(asked))
        context.resume.interval_s = config.resume_interval_s
        while (step := len(state.curve)) < config.num_steps:
            groups = rollouts.sample(
                mixed_modes(rows, state.batches[step], model, config, step), seed=(config.seed or 0) * 7919 + step + 1
            )
            check_weight_version(groups, step)
            numbers = judged(groups) | learner.learn(groups)
            engine.update_weights(policy.named_parameters(), version=step + 1)
            state.curve.append(numbers)
            context.progress(step + 1, config.num_steps, "", **numbers)
            if (context.stopping() or context.resume.due()) and step + 1 < config.num_steps:
                state.updates, state.quarantine = learner.num_updates, rollouts.environment.quarantine
                save_point(context, step + 1, policy, learner.optimizer, asdict(state))
                if context.stopping():
                    raise Interrupted
        quarantine = dict(rollouts.environment.quarantine)
    save_model(policy.train(False), out / "policy", tokenizer=model)
    return {"pass_rate_before": state.pass_rate, "curve": state.curve, "quarantine": quarantine}


def load_problems(problems: Path, config: RlConfig) -> list[dict[str, object]]:
    """Training problems of `min_level` and above in seeded order, at most `max_problems`."""
    everything = list(read_rows(problems / "train.jsonl"))
    if not everything:
        raise DataError("there are no training problems", hint="give the recipe `rl:` problems with answers")
    levels = [int(str(row.get("level", 0))) for row in everything]
    rows = [row for row, level in zip(everything, levels, strict=True) if level >= config.min_level]
    if not rows:
        raise DataError(
            f"no training problem has level {config.min_level} or above; the highest is {max(levels)}",
            hint="lower rl.min_level",
        )
    random.Random(config.seed or 0).shuffle(rows)
    return rows[: config.max_problems]


def ask(rows: Sequence[dict[str, object]], tokenizer: Path, mode: str) -> list[Problem]:
    """Each row as a prompt in one mode."""
    encoded = prompt_ids(tokenizer, [str(row["question"]) for row in rows], mode)
    return [Problem(str(row["id"]), ids, str(row["answer"]), mode) for row, ids in zip(rows, encoded, strict=True)]


def mixed_modes(
    rows: Sequence[dict[str, object]], batch: Sequence[int], tokenizer: Path, config: RlConfig, step: int
) -> list[Problem]:
    """The problems of a batch, a share of them asked with thinking off."""
    chosen = [rows[number] for number in batch]
    num_off = round(config.thinking_off_fraction * len(chosen))
    random.Random((config.seed or 0) + step).shuffle(chosen)
    return ask(chosen[num_off:], tokenizer, "on") + (ask(chosen[:num_off], tokenizer, "off") if num_off else [])


class Rollouts:
    """Samples and judges answers with the engine's current weights."""

    def __init__(self, engine: Engine, model: Path, config: RlConfig, context: StageContext) -> None:
        self.environment = Environment()
        self._engine, self._config, self._context = engine, config, context
        self._tokenizer, self._eos = Tokenizer.from_file(str(model / "tokenizer.json")), eos_token_id(model)

    def sample(self, problems: Sequence[Problem], seed: int, samples: int | None = None) -> list[list[Answer]]:
        """A group of answers to each problem."""
        before = len(self.environment.quarantine)
        groups = roll_out(
            self._engine,
            self._tokenizer,
            problems,
            self.environment,
            samples=samples or self._config.samples_per_prompt,
            temperature=self._config.temperature,
            max_tokens=self._config.max_tokens,
            eos=self._eos,
            seed=seed,
        )
        if len(self.environment.quarantine) > before:
            self._context.note(f"{len(self.environment.quarantine)} problems are in quarantine: their judge failed")
        return groups

    def curriculum(self, problems: Sequence[Problem]) -> tuple[float, list[list[int]]]:
        """Mean pass rate of the incoming model, and the problem numbers of each batch, too easy ones dropped."""
        config = self._config
        groups = self.sample(problems, seed=config.seed or 0, samples=config.pass_rate_samples)
        rate_of = {group[0].problem.id: sum(answer.reward.right for answer in group) / len(group) for group in groups}
        kept = [i for i, p in enumerate(problems) if rate_of.get(p.id, 1.0) < config.max_pass_rate]
        if len(kept) < config.prompts_per_step:
            self._context.note(
                f"only {len(kept)} problems are below max_pass_rate={config.max_pass_rate}: all are used"
            )
            kept = [i for i, p in enumerate(problems) if p.id in rate_of]
        batches = order_problems(
            [rate_of[problems[i].id] for i in kept],
            batch_size=config.prompts_per_step,
            num_batches=config.num_steps,
            seed=config.seed or 0,
        )
        mean = sum(rate_of.values()) / max(1, len(rate_of))
        return mean, [[kept[i] for i in batch] for batch in batches]


def judged(groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Means over all answers of a rollout, for the curves."""
    answers = [answer for group in groups for answer in group]
    columns: dict[str, list[float]] = {
        "reward": [answer.reward.total for answer in answers],
        "accuracy": [answer.reward.right for answer in answers],
        "format": [answer.reward.kept_format for answer in answers],
        "answer_tokens": [len(answer.token_ids) for answer in answers],
    }
    return {name: sum(values) / max(1, len(values)) for name, values in columns.items()}
