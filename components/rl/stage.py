"""Reinforcement learning with verifiable rewards. Source: arXiv 2505.00949, section 5."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from components.core.base.errors import DataError, InputError
from components.core.model.checkpoint import load_model, save_model
from components.core.model.inspection import stored_dtype
from components.core.runtime.context import Interrupted, StageContext
from components.core.runtime.devices import device_of
from components.core.serving.engine import Engine
from components.core.text.packing import eos_token_id
from components.core.training.checkpoints import load_point, save_point
from components.core.training.train_config import compute_dtype
from components.rl.config import RlConfig
from components.rl.curriculum import load_problems, longest_prompt, mixed_modes, order_problems, to_problems
from components.rl.grpo import Learner
from components.rl.rollout import Answer, Environment, Problem, check_weight_version, roll_out


@dataclass
class RlState:
    """State of a run besides weights and optimizer, saved with each resume point.

    Attributes:
        pass_rate: mean pass rate of the incoming model.
        batches: problem numbers of each step, in the order of the curriculum.
        curve: metrics of each step so far.
        updates: optimizer steps so far.
        quarantine: for the id of each problem whose judge failed, the error.
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
    stored = stored_dtype(model)
    policy = load_model(model, device=device_of(context.placement))
    learner = Learner(policy, config.model_copy(update={"dtype": compute_dtype(config.dtype, stored)}))
    resumed = load_point(context, policy, learner.optimizer)
    with_thinking = to_problems(rows, model, "on")
    with Engine(
        model,
        max_model_len=config.max_tokens + longest_prompt(rows, model, config),
        max_num_seqs=config.prompts_per_step * config.samples_per_prompt,
        seed=config.seed or 0,
    ) as engine:
        rollouts = Rollouts(engine, model, config, context)
        if resumed:
            state = RlState(**resumed[1])
            learner.num_updates = state.updates
            rollouts.environment.quarantine |= state.quarantine
            engine.update_weights(policy.named_parameters(), version=len(state.curve))
        else:
            state = RlState(*rollouts.curriculum(with_thinking))
        context.resume.interval_s = config.resume_interval_s
        while (step := len(state.curve)) < config.num_steps:
            groups = rollouts.sample(
                mixed_modes(rows, state.batches[step], model, config, step), seed=(config.seed or 0) * 7919 + step + 1
            )
            check_weight_version(groups, step)
            metrics = mean_scores(groups) | learner.learn(groups)
            engine.update_weights(policy.named_parameters(), version=step + 1)
            state.curve.append(metrics)
            context.progress(step + 1, config.num_steps, "", **metrics)
            report_first_without_spread(state.curve, context)
            if (context.stopping() or context.resume.due()) and step + 1 < config.num_steps:
                state.updates, state.quarantine = learner.num_updates, rollouts.environment.quarantine
                save_point(context, step + 1, policy, learner.optimizer, asdict(state))
                if context.stopping():
                    raise Interrupted
        quarantine = dict(rollouts.environment.quarantine)
    without_spread = steps_without_spread(state.curve)
    if without_spread:
        unchanged = "; the policy is the incoming model, unchanged" if learner.num_updates == 0 else ""
        context.note(
            f"{len(without_spread)} of {config.num_steps} steps had no spread of rewards in any group{unchanged}"
        )
    save_model(policy.train(False), out / "policy", tokenizer=model, dtype=getattr(torch, stored))
    return {
        "pass_rate_before": state.pass_rate,
        "steps_without_spread": len(without_spread),
        "curve": state.curve,
        "quarantine": quarantine,
    }


class Rollouts:
    """Samples answers with the engine's current weights, and scores them."""

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
            problem, reason = next(reversed(self.environment.quarantine.items()))
            self._context.note(
                f"{len(self.environment.quarantine)} problems are in quarantine, because answers to them could not be "
                f"graded; {problem}: {reason}"
            )
        return groups

    def curriculum(self, problems: Sequence[Problem]) -> tuple[float, list[list[int]]]:
        """Mean pass rate of the incoming model, and the problem numbers of each batch, without too easy problems."""
        config = self._config
        groups = self.sample(problems, seed=config.seed or 0, samples=config.pass_rate_samples)
        rate_of = {group[0].problem.id: sum(answer.reward.correct for answer in group) / len(group) for group in groups}
        if not rate_of:
            raise DataError(
                "every training problem is in quarantine, because answers to them could not be graded",
                hint="give problems whose answers are numbers or short formulas",
            )
        selected = [i for i, p in enumerate(problems) if rate_of.get(p.id, 1.0) < config.max_pass_rate]
        if len(selected) < config.prompts_per_step:
            self._context.note(
                f"only {len(selected)} problems are below max_pass_rate={config.max_pass_rate}: all are used"
            )
            selected = [i for i, p in enumerate(problems) if p.id in rate_of]
        if not any(rate_of.values()):
            scores = mean_scores(groups)
            self._context.note(
                f"the incoming model solves none of {len(groups)} problems in {config.pass_rate_samples} answers each: "
                f"{scores['format']:.0%} of its answers have the right format, {scores['truncated']:.0%} are cut off "
                f"at max_tokens={config.max_tokens}; no step can reward accuracy until an answer is right. Easier "
                "problems, more fine-tuning or a larger rl.max_tokens help"
            )
        batches = order_problems(
            [rate_of[problems[i].id] for i in selected],
            batch_size=config.prompts_per_step,
            num_batches=config.num_steps,
            seed=config.seed or 0,
        )
        mean = sum(rate_of.values()) / max(1, len(rate_of))
        return mean, [[selected[i] for i in batch] for batch in batches]


def mean_scores(groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Means over all answers of a rollout, and the fraction of groups whose rewards differ, for the curves."""
    answers = [answer for group in groups for answer in group]
    columns: dict[str, list[float]] = {
        "reward": [answer.reward.total for answer in answers],
        "accuracy": [answer.reward.correct for answer in answers],
        "format": [answer.reward.format_ok for answer in answers],
        "answer_tokens": [len(answer.token_ids) for answer in answers],
        "truncated": [answer.truncated for answer in answers],
        "groups_with_spread": [len({answer.reward.total for answer in group}) > 1 for group in groups],
    }
    return {name: sum(values) / max(1, len(values)) for name, values in columns.items()}


def steps_without_spread(curve: Sequence[Mapping[str, float]]) -> list[int]:
    """Numbers of the steps, from 1, in which the rewards of each group were equal: they have nothing to learn from."""
    return [step for step, metrics in enumerate(curve, 1) if metrics["groups_with_spread"] == 0]


def report_first_without_spread(curve: Sequence[Mapping[str, float]], context: StageContext) -> None:
    """Say it if the newest step is the first one without a spread of rewards."""
    if steps_without_spread(curve) == [len(curve)]:
        scores = curve[-1]
        context.note(
            f"step {len(curve)} changes nothing, because the rewards in each group are equal: accuracy "
            f"{scores['accuracy']:.0%}, format {scores['format']:.0%}, cut off {scores['truncated']:.0%}"
        )
