"""Reinforcement learning with verifiable rewards. Source: arXiv 2505.00949, section 5."""

import copy
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from components.core.base.errors import DataError, InputError
from components.core.model.checkpoint import load_model, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import Interrupted, StageContext
from components.core.serving.engine import Engine
from components.core.text.chat import prompt_ids
from components.core.text.example import Example
from components.core.text.packing import best_fit_decreasing, eos_token_id, pack_rows, read_rows
from components.core.training.checkpoints import load_point, save_point
from components.core.training.loop import adamw
from components.core.training.losses import counted, token_logprobs
from components.rl.config import RlConfig
from components.rl.curriculum import order_problems
from components.rl.grpo import PolicyLoss, group_advantages, policy_loss
from components.rl.reward import Environment
from components.rl.rollout import Answer, Problem, refuse_stale, roll_out


def run(config: RlConfig, *, context: StageContext, out: Path, model: Path, problems: Path) -> dict[str, Any]:
    """Measure pass rates, plan the curriculum, then roll out and learn in turn; vLLM and learner share the process."""
    if context.placement.processes > 1:
        raise InputError(
            f"rl runs as one process, not {context.placement.processes}", hint="set rl.placement.processes to 1"
        )
    torch.manual_seed(config.seed or 0)
    rows = load_problems(problems, config)
    policy = load_model(model)
    learner = Learner(policy, config, model)
    found = load_point(context, policy, learner.optimizer)
    with Engine(
        model,
        max_model_len=config.max_tokens + max(len(p.prompt_ids) for p in ask(rows, model, "on")),
        max_num_seqs=config.prompts_per_step * config.samples_per_prompt,
        seed=config.seed or 0,
    ) as engine:
        rollouts = Rollouts(engine, Tokenizer.from_file(str(model / "tokenizer.json")), learner.eos, config, context)
        if found:
            first_step, state = found
            curve, batches, pass_rate = state["curve"], state["batches"], state["pass_rate"]
            learner.updates = state["updates"]
            rollouts.environment.quarantine |= state["quarantine"]
            engine.update_weights(policy.named_parameters(), version=first_step)
        else:
            first_step, curve = 0, []
            pass_rate, batches = rollouts.curriculum(ask(rows, model, "on"))
        context.resume.interval_s = config.resume_interval_s
        for step in range(first_step, config.num_steps):
            asked = mixed_modes(rows, batches[step], model, config, step)
            groups = rollouts.sample(asked, seed=(config.seed or 0) * 7919 + step + 1)
            refuse_stale(groups, step, config.max_staleness)
            numbers = learner.learn(groups)
            engine.update_weights(policy.named_parameters(), version=step + 1)
            curve.append(numbers)
            context.progress(step + 1, config.num_steps, "", **numbers)
            if (context.stopping() or context.resume.due()) and step + 1 < config.num_steps:
                state = {"curve": curve, "batches": batches, "pass_rate": pass_rate, "updates": learner.updates}
                state["quarantine"] = rollouts.environment.quarantine
                save_point(context, step + 1, policy, learner.optimizer, state)
                if context.stopping():
                    raise Interrupted
        quarantine = dict(rollouts.environment.quarantine)
    save_model(policy.train(False), out / "policy", tokenizer=model)
    return {"pass_rate_before": pass_rate, "curve": curve, "quarantine": quarantine}


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

    def __init__(self, engine: Engine, tokenizer: Tokenizer, eos: int, config: RlConfig, context: StageContext) -> None:
        self.environment = Environment(config.accuracy_reward, config.format_reward)
        self._engine, self._tokenizer, self._eos, self._config, self._context = engine, tokenizer, eos, config, context

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
            width=config.curriculum_width,
            seed=config.seed or 0,
        )
        mean = sum(rate_of.values()) / max(1, len(rate_of))
        return mean, [[kept[i] for i in batch] for batch in batches]


class Learner:
    """The policy and its optimizer."""

    def __init__(self, policy: TesseraForCausalLM, config: RlConfig, folder: Path) -> None:
        self.policy, self.config, self.eos = policy, config, eos_token_id(folder)
        self.optimizer = adamw(policy, config.learning_rate)
        self.reference = copy.deepcopy(policy).train(False).requires_grad_(False) if config.kl_coef else None
        self.updates = 0
        """Optimizer steps so far, which the warm-up goes by."""

    def learn(self, groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
        """`updates_per_step` optimizer steps, each on an equal share of the groups. Returns the curves' numbers."""
        answers = [answer for group in groups for answer in group]
        numbers = {
            "reward": _mean([answer.reward.total for answer in answers]),
            "accuracy": _mean([answer.reward.right for answer in answers]),
            "format": _mean([answer.reward.kept_format for answer in answers]),
            "answer_tokens": _mean([len(answer.token_ids) for answer in answers]),
        }
        for part in range(self.config.updates_per_step):
            numbers |= self._update(groups[part :: self.config.updates_per_step])
        return numbers

    def _update(self, groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
        """One optimizer step, the loss averaged over all answer tokens of these groups."""
        rewards_GS = torch.tensor([[answer.reward.total for answer in group] for group in groups])
        weights = group_advantages(rewards_GS).flatten().tolist() if len(groups) else []
        answers = [answer for group in groups for answer in group]
        useful = [(answer, weight) for answer, weight in zip(answers, weights, strict=True) if weight != 0.0]
        if not useful:
            return {}
        self.policy.train()
        num_tokens = sum(len(answer.token_ids) for answer, _ in useful)
        clipped = kl = 0.0
        for start in range(0, len(useful), self.config.micro_batch_size):
            loss = self._loss(useful[start : start + self.config.micro_batch_size])
            (loss.total / num_tokens).backward()
            clipped, kl = clipped + float(loss.clipped), kl + float(loss.kl)
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_grad_norm)
        self.updates += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, self.updates / max(1, self.config.warmup_steps))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"clipped": clipped / num_tokens, "kl": kl / num_tokens, "grad_norm": float(norm)}

    def _loss(self, useful: Sequence[tuple[Answer, float]]) -> PolicyLoss:
        """The clipped loss of some answers, packed into rows."""
        examples = [
            Example(
                [*answer.problem.prompt_ids, *answer.token_ids],
                [False] * len(answer.problem.prompt_ids) + [True] * len(answer.token_ids),
            )
            for answer, _ in useful
        ]
        lengths = [len(example.token_ids) for example in examples]
        seq_len = max(128, *lengths)
        rows = best_fit_decreasing(lengths, seq_len)
        batch = pack_rows([[examples[i] for i in row] for row in rows], seq_len, pad=0)
        order = [useful[i] for row in rows for i in row]
        old_N = torch.tensor([value for answer, _ in order for value in answer.logprobs])
        advantages_N = torch.tensor([weight for answer, weight in order for _ in answer.token_ids])
        inputs = (batch.input_ids_BT, batch.position_ids_BT, batch.segment_ids_BT, batch.labels_BT)
        reference_N = None
        if self.reference is not None:
            with torch.no_grad():
                reference_N = self._logprobs(self.reference, *inputs)
        return policy_loss(
            self._logprobs(self.policy, *inputs),
            old_N,
            advantages_N,
            clip_ratio=self.config.clip_ratio,
            reference_logprobs_N=reference_N,
            kl_coef=self.config.kl_coef,
        )

    def _logprobs(
        self,
        model: TesseraForCausalLM,
        input_ids_BT: Tensor,
        positions_BT: Tensor,
        segments_BT: Tensor,
        labels_BT: Tensor,
    ) -> Tensor:
        """Log-probabilities of the answer tokens, in row order."""
        output = model.model(input_ids_BT, position_ids=positions_BT, segment_ids=segments_BT)
        hidden_ND, labels_N = counted(output.last_hidden_state, labels_BT)
        return token_logprobs(hidden_ND, labels_N, model.lm_head)


def _mean(values: Sequence[float]) -> float:
    """Arithmetic mean; 0 for nothing."""
    return sum(values) / len(values) if values else 0.0
