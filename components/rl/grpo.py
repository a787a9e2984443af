"""Group-relative policy optimisation: advantages within a group, the clipped losses, and the learner.

The engine samples with the learner's weights, and yet with slightly other probabilities where its kernels or its
precision differ. Truncated importance weights correct for that.

Source: arXiv 2402.03300, section 4; arXiv 1802.01561, section 4.1, for the truncated weights.

Shape letters: G groups (problems), S answers of a group, N answer tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.example import Example
from components.core.text.packing import Batch, best_fit_decreasing, pack_rows
from components.core.training.loop import Objective, OptimizerStep, adamw
from components.core.training.losses import counted, token_logprobs
from components.core.training.train_config import warm_up
from components.rl.config import Loss, RlConfig
from components.rl.rollout import Answer


def group_advantages(rewards_GS: Tensor, loss: Loss = "dapo") -> Tensor:
    """Rewards against those of their group; 0 where all rewards of a group are equal.

    Args:
        rewards_GS: float, one row per problem.
        loss: `grpo` and `dapo` divide what a reward is above the group's mean by the group's standard deviation;
            `dr_grpo` does not (arXiv 2503.20783, section 3.2); `rloo` takes the mean of the other answers, S/(S-1)
            times as far away (arXiv 2402.14740, section 3).

    Returns:
        Float, same shape.
    """
    centred_GS = rewards_GS - rewards_GS.mean(dim=1, keepdim=True)
    spread_G1 = rewards_GS.std(dim=1, keepdim=True, correction=0)
    group_size = rewards_GS.shape[1]
    if loss == "rloo":
        scaled_GS = centred_GS * group_size / (group_size - 1)
    elif loss == "dr_grpo":
        scaled_GS = centred_GS
    else:
        scaled_GS = centred_GS / (spread_G1 + 1e-6)
    return torch.where(spread_G1 > 1e-6, scaled_GS, torch.zeros_like(centred_GS))


def token_weights(lengths: Sequence[int], loss: Loss, max_tokens: int) -> list[float]:
    """Weight of the tokens of each answer in a loss that is the weighted sum over all tokens by their number.

    Args:
        lengths: tokens of each answer of an optimizer step.
        loss: `dapo` weighs all tokens alike (arXiv 2503.14476, section 3.3), `grpo` all answers (arXiv 2402.03300,
            equation 3), `dr_grpo` divides the sum of an answer by `max_tokens`, and `rloo` leaves it whole.
        max_tokens: maximum length of an answer.
    """
    mean = sum(lengths) / max(1, len(lengths))
    if loss == "grpo":
        return [mean / length for length in lengths]
    return [{"dapo": 1.0, "dr_grpo": mean / max_tokens, "rloo": mean}[loss]] * len(lengths)


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
    clip_range: tuple[float, float],
    weights_N: Tensor | None = None,
    reference_logprobs_N: Tensor | None = None,
    kl_coef: float = 0.0,
) -> PolicyLoss:
    """The clipped surrogate, negated and summed over answer tokens.

    Args:
        logprobs_N: log-probabilities of the sampled tokens under the learner; they receive the gradient.
        old_logprobs_N: the learner's log-probabilities before the first update with these answers.
        advantages_N: advantage of the answer that each token belongs to.
        clip_range: lowest and highest ratio.
        weights_N: weight of each token in the loss; None: 1.
        reference_logprobs_N: log-probabilities under the reference model; None without a KL term.
        kl_coef: weight of the low-variance estimate of the KL.
    """
    ratio_N = torch.exp(logprobs_N - old_logprobs_N)
    surrogate_N = ratio_N * advantages_N
    clipped_N = ratio_N.clamp(*clip_range) * advantages_N
    loss_N = -torch.minimum(surrogate_N, clipped_N)
    kl = torch.zeros(())
    if reference_logprobs_N is not None:
        gap_N = reference_logprobs_N - logprobs_N
        kl_N = torch.exp(gap_N) - gap_N - 1
        kl, loss_N = kl_N.detach().sum(), loss_N + kl_coef * kl_N
    total = loss_N.sum() if weights_N is None else (weights_N * loss_N).sum()
    return PolicyLoss(total, (surrogate_N > clipped_N).sum(), kl)


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
        weights_N: weight of each token in the loss.
        old_logprobs_N: the learner's log-probabilities before the first update with the rollout; None in the first
            update, where they are those of the learner as it is.
    """

    rows: Batch
    engine_logprobs_N: Tensor
    advantages_N: Tensor
    weights_N: Tensor
    old_logprobs_N: Tensor | None = None

    def to(self, device: torch.device) -> "PolicyBatch":
        """The same answers on another device, as long as they have no `old_logprobs_N`."""
        return PolicyBatch(
            self.rows.to(device),
            self.engine_logprobs_N.to(device),
            self.advantages_N.to(device),
            self.weights_N.to(device),
        )


class Learner:
    """The policy, its optimizer, and the reference model if the loss has a KL term."""

    def __init__(self, policy: TesseraForCausalLM, config: RlConfig) -> None:
        self.optimizer = adamw(policy, config.learning_rate, optimizer=config.optimizer)
        self.num_updates = 0
        """Optimizer steps so far; the warm-up counts them."""
        self._policy, self._config = policy, config
        self._reference = copy.deepcopy(policy).train(False).requires_grad_(False) if config.kl_coef else None
        dtype: torch.dtype = getattr(torch, config.dtype or "float32")
        self._step = OptimizerStep(Objective(policy, self._loss), self.optimizer, policy.device, dtype)
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
        config = self._config
        weighted = with_weights(groups, config)
        num_tokens = sum(len(item.answer.token_ids) for item in weighted)
        computed = [item for item in weighted if item.advantage != 0.0 or self._reference is not None]
        size = config.micro_batch_size
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
        config, temperature = self._config, self._config.temperature
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
            clip_range=(1 - config.clip_ratio, 1 + (config.clip_ratio_high or config.clip_ratio)),
            weights_N=batch.weights_N,
            reference_logprobs_N=reference_N,
            kl_coef=config.kl_coef,
        )
        return {"loss": loss.total, "clipped": loss.clipped, "kl": loss.kl}


class WeightedAnswer(NamedTuple):
    """An answer, its advantage, and the weight of its tokens in the loss."""

    answer: Answer
    advantage: float
    weight: float


def with_weights(groups: Sequence[Sequence[Answer]], config: RlConfig) -> list[WeightedAnswer]:
    """Answers with advantages and weights, without those that the loss leaves out."""
    if not groups:
        return []
    rewards_GS = torch.tensor([[answer.reward.total for answer in group] for group in groups])
    advantages = group_advantages(rewards_GS, config.loss).flatten().tolist()
    answers = [answer for group in groups for answer in group]
    pairs = [
        (answer, advantage)
        for answer, advantage in zip(answers, advantages, strict=True)
        if not (config.mask_truncated and answer.truncated)
    ]
    weights = token_weights([len(answer.token_ids) for answer, _ in pairs], config.loss, config.max_tokens)
    return [WeightedAnswer(*pair, weight) for pair, weight in zip(pairs, weights, strict=True)]


def pack_answers(answers: Sequence[WeightedAnswer]) -> PolicyBatch:
    """Pack prompts and answers into rows; the values of tokens are in the order of the packed tokens."""
    examples = [
        Example(
            [*answer.problem.prompt_ids, *answer.token_ids],
            [False] * len(answer.problem.prompt_ids) + [True] * len(answer.token_ids),
        )
        for answer, _, _ in answers
    ]
    lengths = [len(example.token_ids) for example in examples]
    seq_len = max(MIN_SEQ_LEN, *lengths)
    rows = best_fit_decreasing(lengths, seq_len)
    in_order = [answers[number] for row in rows for number in row]
    return PolicyBatch(
        pack_rows([[examples[number] for number in row] for row in rows], seq_len, pad=0),
        torch.tensor([logprob for answer, _, _ in in_order for logprob in answer.logprobs]),
        torch.tensor([advantage for answer, advantage, _ in in_order for _ in answer.token_ids]),
        torch.tensor([weight for answer, _, weight in in_order for _ in answer.token_ids]),
    )


def answer_logprobs(model: TesseraForCausalLM, rows: Batch, temperature: float) -> Tensor:
    """Log-probabilities of the answer tokens at a temperature, (N,), in the order of the rows."""
    output = model.model(rows.input_ids_BT, position_ids=rows.position_ids_BT, segment_ids=rows.segment_ids_BT)
    hidden_ND, labels_N = counted(output.last_hidden_state, rows.labels_BT)
    return token_logprobs(hidden_ND / temperature, labels_N, model.lm_head)  # the head has no bias
