"""Group-relative policy optimisation: advantages within a group, the clipped loss, and the learner.

The engine samples with the learner's weights, and yet with slightly other probabilities where its kernels or its
precision differ. Truncated importance weights correct for that.

Source: arXiv 2402.03300, section 4; arXiv 1802.01561, section 4.1, for the truncated weights.

Shape letters: G groups (problems), S answers of a group, N answer tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.example import Example
from components.core.text.packing import Batch, best_fit_decreasing, pack_rows
from components.core.training.loop import Objective, OptimizerStep, adamw
from components.core.training.losses import counted, token_logprobs
from components.core.training.train_config import warm_up
from components.rl.config import RlConfig
from components.rl.rollout import Answer


def group_advantages(rewards_GS: Tensor) -> Tensor:
    """Rewards minus the mean of their group, divided by its standard deviation; 0 if all rewards of a group are equal.

    Args:
        rewards_GS: float, one row per problem.

    Returns:
        Float, same shape.
    """
    centred_GS = rewards_GS - rewards_GS.mean(dim=1, keepdim=True)
    spread_G1 = rewards_GS.std(dim=1, keepdim=True, correction=0)
    return torch.where(spread_G1 > 1e-6, centred_GS / (spread_G1 + 1e-6), torch.zeros_like(centred_GS))


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over answer tokens: the loss, and two numbers for the curves."""

    total: Tensor
    """The loss, with gradient."""
    clipped: Tensor
    """Number of tokens whose gradient is cut off because their ratio was clipped."""
    kl: Tensor
    """KL(policy || reference), nats, summed; zero without a reference."""


def policy_loss(
    logprobs_N: Tensor,
    old_logprobs_N: Tensor,
    advantages_N: Tensor,
    *,
    clip_ratio: float,
    reference_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
) -> PolicyLoss:
    """The clipped surrogate, negated and summed over answer tokens.

    Args:
        logprobs_N: log-probabilities of the sampled tokens under the learner; they receive the gradient.
        old_logprobs_N: the learner's log-probabilities before the first update with these answers.
        advantages_N: advantage of the answer that each token belongs to.
        clip_ratio: half-width of the interval around 1 that the ratio is clipped to.
        reference_logprobs_N: log-probabilities under the reference model; None without a KL term.
        kl_coef: weight of the low-variance estimate of the KL.
    """
    ratio_N = torch.exp(logprobs_N - old_logprobs_N)
    surrogate_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages_N
    total = -torch.minimum(surrogate_N, clipped_N).sum()
    kl = torch.zeros(())
    if reference_logprobs_N is not None:
        gap_N = reference_logprobs_N - logprobs_N
        kl = (torch.exp(gap_N) - gap_N - 1).sum()
        total = total + kl_coef * kl
    return PolicyLoss(total, (surrogate_N > clipped_N).sum(), kl.detach())


MIN_SEQ_LEN = 128
"""Minimum length of a packed row, tokens; longer answers make longer rows."""
MAX_IMPORTANCE_WEIGHT = 2.0
"""Maximum importance weight of a token; it bounds the variance of the gradient."""


@dataclass(frozen=True)
class PolicyBatch:
    """Packed answers of a rollout.

    Attributes:
        rows: prompts and answers; only tokens of answers count in the loss.
        engine_logprobs_N: log-probabilities under the engine that sampled the answers.
        advantages_N: advantage of the answer that each token belongs to.
        old_logprobs_N: the learner's log-probabilities before the first update with the rollout; None in the first
            update, where they are those of the learner as it is.
    """

    rows: Batch
    engine_logprobs_N: Tensor
    advantages_N: Tensor
    old_logprobs_N: Tensor | None = None

    def to(self, device: torch.device) -> "PolicyBatch":
        """The same answers on another device, as long as they have no `old_logprobs_N`."""
        engine_N, advantages_N = self.engine_logprobs_N.to(device), self.advantages_N.to(device)
        return replace(self, rows=self.rows.to(device), engine_logprobs_N=engine_N, advantages_N=advantages_N)


class Learner:
    """The policy, its optimizer, and the reference model if the loss has a KL term."""

    def __init__(self, policy: TesseraForCausalLM, config: RlConfig) -> None:
        self.optimizer = adamw(policy, config.learning_rate)
        self.num_updates = 0
        """Optimizer steps so far; the warm-up counts them."""
        self._policy, self._config = policy, config
        self._reference = copy.deepcopy(policy).train(False).requires_grad_(False) if config.kl_coef else None
        dtype: torch.dtype = getattr(torch, config.dtype or "float32")
        self._step = OptimizerStep(Objective(policy, self._loss), self.optimizer, dtype)
        self._log_ratios: list[Tensor] = []

    def learn(self, groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
        """Take `updates_per_step` optimizer steps, each on an equal share of the groups.

        A share in which nothing has a gradient takes no step.

        Returns:
            `clipped`, `kl` and `grad_norm` of the last step; `log_ratio` and `max_log_ratio`: mean and maximum over
            tokens of |log ratio| of learner and engine, nats. Empty if no step was taken.
        """
        self._policy.train()
        updates = self._config.updates_per_step
        shares = [self._micro_batches(groups[part::updates]) for part in range(updates)]
        steps = [(batches, num_tokens) for batches, num_tokens in shares if batches]
        for batches, _ in steps[1:]:  # before the first update changes the weights
            batches[:] = [replace(batch, old_logprobs_N=self._logprobs_before(batch)) for batch in batches]
        self._log_ratios.clear()
        metrics: dict[str, float] = {}
        for batches, num_tokens in steps:
            metrics = self._update(batches, num_tokens)
        if not metrics:
            return {}
        log_ratios = torch.cat(self._log_ratios)
        return metrics | {"log_ratio": float(log_ratios.mean()), "max_log_ratio": float(log_ratios.max())}

    def _micro_batches(self, groups: Sequence[Sequence[Answer]]) -> tuple[list[PolicyBatch], int]:
        """Packed answers for one optimizer step, and the number of tokens that its loss is a mean over.

        Answers with advantage 0 count in that number. They are computed only for the KL term: without it they have no
        gradient.
        """
        pairs = [pair for pair in with_advantages(groups) if not (self._config.mask_truncated and pair[0].truncated)]
        num_tokens = sum(len(answer.token_ids) for answer, _ in pairs)
        computed = [pair for pair in pairs if pair[1] != 0.0 or self._reference is not None]
        size = self._config.micro_batch_size
        parts = [computed[start : start + size] for start in range(0, len(computed), size)]
        return [pack_answers(part).to(self._step.device) for part in parts], num_tokens

    def _update(self, micro_batches: Sequence[PolicyBatch], num_tokens: int) -> dict[str, float]:
        """One optimizer step."""
        rate = warm_up(self._config.learning_rate, self.num_updates, self._config.warmup_steps)
        metrics = self._step.run(micro_batches, num_tokens, rate)
        self.num_updates += 1
        return {name: metrics[name] for name in ("clipped", "kl", "grad_norm")}

    @torch.no_grad()
    def _logprobs_before(self, batch: PolicyBatch) -> Tensor:
        with self._step.precision():
            return answer_logprobs(self._policy, batch.rows, self._config.temperature)

    def _loss(self, policy: TesseraForCausalLM, batch: PolicyBatch) -> dict[str, Tensor]:
        """The loss of a micro batch of answers."""
        temperature = self._config.temperature
        reference_N = None
        if self._reference is not None:
            with torch.no_grad():
                reference_N = answer_logprobs(self._reference, batch.rows, temperature)
        logprobs_N = answer_logprobs(policy, batch.rows, temperature)
        old_logprobs_N = logprobs_N.detach() if batch.old_logprobs_N is None else batch.old_logprobs_N
        log_ratio_N = old_logprobs_N - batch.engine_logprobs_N
        self._log_ratios.append(log_ratio_N.abs())
        loss = policy_loss(
            logprobs_N,
            old_logprobs_N,
            log_ratio_N.exp().clamp(max=MAX_IMPORTANCE_WEIGHT) * batch.advantages_N,
            clip_ratio=self._config.clip_ratio,
            reference_logprobs_N=reference_N,
            kl_coef=self._config.kl_coef,
        )
        return {"loss": loss.total, "clipped": loss.clipped, "kl": loss.kl}


def with_advantages(groups: Sequence[Sequence[Answer]]) -> list[tuple[Answer, float]]:
    """Answers and their advantages."""
    if not groups:
        return []
    rewards_GS = torch.tensor([[answer.reward.total for answer in group] for group in groups])
    answers = [answer for group in groups for answer in group]
    return list(zip(answers, group_advantages(rewards_GS).flatten().tolist(), strict=True))


def pack_answers(answers: Sequence[tuple[Answer, float]]) -> PolicyBatch:
    """Pack prompts and answers into rows; log-probabilities and advantages are in the order of the packed tokens."""
    examples = [
        Example(
            [*answer.problem.prompt_ids, *answer.token_ids],
            [False] * len(answer.problem.prompt_ids) + [True] * len(answer.token_ids),
        )
        for answer, _ in answers
    ]
    lengths = [len(example.token_ids) for example in examples]
    seq_len = max(MIN_SEQ_LEN, *lengths)
    rows = best_fit_decreasing(lengths, seq_len)
    in_order = [answers[number] for row in rows for number in row]
    return PolicyBatch(
        pack_rows([[examples[number] for number in row] for row in rows], seq_len, pad=0),
        torch.tensor([logprob for answer, _ in in_order for logprob in answer.logprobs]),
        torch.tensor([advantage for answer, advantage in in_order for _ in answer.token_ids]),
    )


def answer_logprobs(model: TesseraForCausalLM, rows: Batch, temperature: float) -> Tensor:
    """Log-probabilities of the answer tokens at a temperature, (N,), in the order of the rows."""
    output = model.model(rows.input_ids_BT, position_ids=rows.position_ids_BT, segment_ids=rows.segment_ids_BT)
    hidden_ND, labels_N = counted(output.last_hidden_state, rows.labels_BT)
    return token_logprobs(hidden_ND / temperature, labels_N, model.lm_head)  # the head has no bias
