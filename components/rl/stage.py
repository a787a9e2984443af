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
from components.core.serving.start_report import report_start
from components.core.text.tokenizer import eos_token_id
from components.core.training.checkpoints import load_point, save_point
from components.core.training.train_config import compute_dtype
from components.rl.config import RlConfig
from components.rl.curriculum import load_problems, longest_prompt, mixed_modes, order_problems, to_problems
from components.rl.grpo import Learner
from components.rl.rollout import Answer, Environment, Problem, Sampler, check_weight_version

PROGRESS_REPORTS = 50
"""Most reports of progress while pass rates are measured."""


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
    with report_start(context):
        opened = Engine(
            model,
            max_model_len=config.max_tokens + longest_prompt(rows, model, config),
            max_num_seqs=config.prompts_per_step * config.samples_per_prompt,
            seed=config.seed or 0,
            serving=config.serving,
        )
    with opened as engine:
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
            sampled, groups = rollouts.groups_of_step(rows, state.batches[step], step)
            check_weight_version(sampled, step)
            metrics = mean_scores(sampled) | learner.learn(groups)
            engine.update_weights(policy.named_parameters(), version=step + 1)
            state.curve.append(metrics)
            context.progress(step + 1, config.num_steps, "", **metrics)
            report_first_without_spread(state.curve, context)
            if (context.stopping() or context.resume.due()) and step + 1 < config.num_steps:
                state.updates, state.quarantine = learner.num_updates, dict(rollouts.environment.quarantine)
                save_point(context, step + 1, policy, learner.optimizer, asdict(state))
                if context.stopping():
                    raise Interrupted
        quarantine = dict(sorted(rollouts.environment.quarantine.items()))
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
    """The answers of each phase of a run: those that measure pass rates, and those of each step."""

    def __init__(self, engine: Engine, model: Path, config: RlConfig, context: StageContext) -> None:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._sampler = Sampler(engine, tokenizer, eos_token_id(model), config)
        self._model, self._config, self._context = model, config, context

    @property
    def environment(self) -> Environment:
        """What judges the answers."""
        return self._sampler.environment

    def groups_of_step(
        self, rows: Sequence[dict[str, object]], numbers: Sequence[int], step: int
    ) -> tuple[list[list[Answer]], list[list[Answer]]]:
        """All groups of a step, and those to learn from.

        Where groups are replaced, the step learns from those with a spread of rewards; if there are too few, the
        others stay.

        Args:
            rows: the training problems.
            numbers: of the problems of this step, in the order in which they are asked.
            step: number of the step, from 0.
        """
        wanted, sampled, chosen = self._config.prompts_per_step, list[list[Answer]](), list[list[Answer]]()
        while numbers and len(chosen) < wanted:
            now, numbers = numbers[: wanted - len(chosen)], numbers[wanted - len(chosen) :]
            problems = mixed_modes(rows, now, self._model, self._config, step)
            seed = (self._config.seed or 0) * 7919 + step + 1 + len(sampled) * 15_485_863
            groups = self._sample(problems, seed, self._config.samples_per_prompt)
            sampled += groups
            chosen += filter(has_spread, groups) if self._config.dynamic_sampling else groups
        without = [group for group in sampled if not has_spread(group)] if self._config.dynamic_sampling else []
        return sampled, chosen + without[: wanted - len(chosen)]

    def curriculum(self, problems: Sequence[Problem]) -> tuple[float, list[list[int]]]:
        """Mean pass rate of the incoming model, and the problem numbers of each step, without too easy problems.

        Raises:
            DataError: no answer can be graded, or none is right and the recipe does not allow such a start.
        """
        config = self._config
        groups = self._sample(problems, config.seed or 0, config.pass_rate_samples, what="problems, pass rates")
        rate_of = {group[0].problem.id: sum(answer.reward.correct for answer in group) / len(group) for group in groups}
        if not rate_of:
            raise DataError(
                "every training problem is in quarantine, because answers to them could not be graded",
                hint="give problems whose answers are numbers or short formulas",
            )
        if not any(rate_of.values()):
            self._refuse_without_reward(groups)
        selected = [i for i, p in enumerate(problems) if rate_of.get(p.id, 1.0) < config.max_pass_rate]
        if len(selected) < config.prompts_per_step:
            self._context.note(
                f"only {len(selected)} problems are below max_pass_rate={config.max_pass_rate}: all are used"
            )
            selected = [i for i, p in enumerate(problems) if p.id in rate_of]
        batches = order_problems(
            [rate_of[problems[i].id] for i in selected],
            batch_size=config.prompts_per_step * (1 + config.dynamic_sampling),
            num_batches=config.num_steps,
            seed=config.seed or 0,
        )
        mean = sum(rate_of.values()) / max(1, len(rate_of))
        return mean, [[selected[i] for i in batch] for batch in batches]

    def _refuse_without_reward(self, groups: Sequence[Sequence[Answer]]) -> None:
        """Say why no step can reward accuracy, and refuse to start unless the recipe allows it."""
        config, scores = self._config, mean_scores(groups)
        fact = (
            f"the incoming model solves none of {len(groups)} problems in {config.pass_rate_samples} answers each: "
            f"{scores['format']:.0%} of its answers have the right format, {scores['truncated']:.0%} are cut off "
            f"at max_tokens={config.max_tokens}; no step can reward accuracy until an answer is right"
        )
        advice = "easier problems, more fine-tuning or a larger rl.max_tokens help"
        if not config.start_without_reward:
            raise DataError(fact, hint=f"{advice}; rl.start_without_reward=true starts all the same")
        self._context.note(f"{fact}; {advice}")

    def _sample(self, problems: Sequence[Problem], seed: int, samples: int, what: str = "") -> list[list[Answer]]:
        """A group of answers to each problem; with `what`, progress is reported under that name."""
        before, interval = len(self.environment.quarantine), max(1, len(problems) // PROGRESS_REPORTS)

        def report(number: int) -> None:
            if what and (number % interval == 0 or number == len(problems)):
                self._context.progress(number, len(problems), what)

        report(0)
        groups = self._sampler.sample(problems, seed=seed, samples=samples, on_finished=report)
        if len(self.environment.quarantine) > before:
            problem, reason = next(reversed(self.environment.quarantine.items()))
            self._context.note(
                f"{len(self.environment.quarantine)} problems are in quarantine, because answers to them could not be "
                f"graded; {problem}: {reason}"
            )
        return groups


def has_spread(group: Sequence[Answer]) -> bool:
    """Whether the rewards of a group differ, so that a step learns from it."""
    return len({answer.reward.total for answer in group}) > 1


def mean_scores(groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
    """Numbers of a rollout for the curves.

    Means over all answers; the number of groups and the fraction of them whose rewards differ; the entropy of the
    policy, nats a token, estimated without bias by the mean of -log p over the tokens that were sampled from it.
    """
    answers = [answer for group in groups for answer in group]
    columns: dict[str, list[float]] = {
        "reward": [answer.reward.total for answer in answers],
        "accuracy": [answer.reward.correct for answer in answers],
        "format": [answer.reward.format_ok for answer in answers],
        "answer_tokens": [len(answer.token_ids) for answer in answers],
        "truncated": [answer.truncated for answer in answers],
        "groups_with_spread": [has_spread(group) for group in groups],
        "entropy": [-logprob for answer in answers for logprob in answer.logprobs],
    }
    means = {name: sum(values) / max(1, len(values)) for name, values in columns.items()}
    return means | {"groups_sampled": float(len(groups))}


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
