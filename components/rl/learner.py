"""The learner of GRPO: answers and their advantages, packed, through the optimizer step that all stages share.

Shape letters: G groups (problems), S answers of a group, N answer tokens.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from components.core.model.decoder import TesseraForCausalLM
from components.core.text.example import Example
from components.core.text.packing import Batch, best_fit_decreasing, pack_rows
from components.core.training.loop import adamw
from components.core.training.losses import counted, token_logprobs
from components.core.training.step import Objective, OptimizerStep
from components.core.training.train_config import warm_up
from components.rl.config import RlConfig
from components.rl.grpo import group_advantages, policy_loss
from components.rl.rollout import Answer

MIN_SEQ_LEN = 128
"""Tokens of a packed row at least; longer answers make longer rows."""


@dataclass(frozen=True)
class PolicyBatch:
    """Packed answers of a rollout.

    Attributes:
        rows: prompts and answers; the answers' tokens count.
        old_logprobs_N: under the weights that sampled the answers.
        advantages_N: advantage of the answer that each token belongs to.
    """

    rows: Batch
    old_logprobs_N: Tensor
    advantages_N: Tensor


class Learner:
    """The policy, its optimizer, and the reference model where the loss has a KL term."""

    def __init__(self, policy: TesseraForCausalLM, config: RlConfig) -> None:
        self.optimizer = adamw(policy, config.learning_rate)
        self.num_updates = 0
        """Optimizer steps so far; the warm-up counts them."""
        self._policy, self._config = policy, config
        self._reference = copy.deepcopy(policy).train(False).requires_grad_(False) if config.kl_coef else None
        self._step = OptimizerStep(Objective(policy, self._loss), self.optimizer)

    def learn(self, groups: Sequence[Sequence[Answer]]) -> dict[str, float]:
        """Take `updates_per_step` optimizer steps, each on an equal share of the groups.

        Returns:
            `clipped`, `kl` and `grad_norm` of the last step; nothing where every answer has the advantage 0.
        """
        numbers: dict[str, float] = {}
        for part in range(self._config.updates_per_step):
            numbers |= self._update(with_advantages(groups[part :: self._config.updates_per_step]))
        return numbers

    def _update(self, answers: Sequence[tuple[Answer, float]]) -> dict[str, float]:
        """One optimizer step, the loss averaged over all tokens of these answers."""
        if not answers:
            return {}
        self._policy.train()
        num_tokens = sum(len(answer.token_ids) for answer, _ in answers)
        size = self._config.micro_batch_size
        micro_batches = (pack_answers(answers[start : start + size]) for start in range(0, len(answers), size))
        rate = warm_up(self._config.learning_rate, self.num_updates, self._config.warmup_steps)
        numbers = self._step.run(micro_batches, num_tokens, rate)
        self.num_updates += 1
        return {name: numbers[name] for name in ("clipped", "kl", "grad_norm")}

    def _loss(self, policy: TesseraForCausalLM, batch: PolicyBatch) -> dict[str, Tensor]:
        """The clipped loss of some answers."""
        reference_N = None
        if self._reference is not None:
            with torch.no_grad():
                reference_N = answer_logprobs(self._reference, batch.rows)
        loss = policy_loss(
            answer_logprobs(policy, batch.rows),
            batch.old_logprobs_N,
            batch.advantages_N,
            clip_ratio=self._config.clip_ratio,
            reference_logprobs_N=reference_N,
            kl_coef=self._config.kl_coef,
        )
        return {"loss": loss.total, "clipped": loss.clipped, "kl": loss.kl}


def with_advantages(groups: Sequence[Sequence[Answer]]) -> list[tuple[Answer, float]]:
    """Answers with their advantages, without those whose advantage is 0: they have no gradient."""
    if not groups:
        return []
    rewards_GS = torch.tensor([[answer.reward.total for answer in group] for group in groups])
    answers = [answer for group in groups for answer in group]
    advantages = group_advantages(rewards_GS).flatten().tolist()
    return [pair for pair in zip(answers, advantages, strict=True) if pair[1] != 0.0]


def pack_answers(answers: Sequence[tuple[Answer, float]]) -> PolicyBatch:
    """Prompts and answers in packed rows; the values a token are in the order of the rows."""
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


def answer_logprobs(model: TesseraForCausalLM, rows: Batch) -> Tensor:
    """Log-probabilities of the answer tokens, (N,), in the order of the rows."""
    output = model.model(rows.input_ids_BT, position_ids=rows.position_ids_BT, segment_ids=rows.segment_ids_BT)
    hidden_ND, labels_N = counted(output.last_hidden_state, rows.labels_BT)
    return token_logprobs(hidden_ND, labels_N, model.lm_head)
