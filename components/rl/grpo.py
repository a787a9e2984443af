"""Group-relative policy optimisation: advantages within a group, clipped ratio. Source: arXiv 2402.03300, section 4.

Shape letters: G groups (problems), S samples of a group, N answer tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def group_advantages(rewards_GS: Tensor) -> Tensor:
    """Each reward less its group's mean, in units of the group's deviation; zero where all of a group are equal.

    Args:
        rewards_GS: float, one row a problem.

    Returns:
        Float, same shape.
    """
    centred_GS = rewards_GS - rewards_GS.mean(dim=1, keepdim=True)
    spread_G1 = rewards_GS.std(dim=1, keepdim=True, correction=0)
    return torch.where(spread_G1 > 1e-6, centred_GS / (spread_G1 + 1e-6), torch.zeros_like(centred_GS))


@dataclass(frozen=True)
class PolicyLoss:
    """Sums over answer tokens, and what the curves show."""

    total: Tensor
    clipped: Tensor
    """Tokens whose ratio lay outside the trust region on the side that the clip acts on."""
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
        logprobs_N: of the sampled tokens under the learner; receives the gradient.
        old_logprobs_N: under the model that sampled them.
        advantages_N: advantage of the answer each token belongs to.
        clip_ratio: half-width of the trust region around a ratio of 1.
        reference_logprobs_N: under the reference model, where `kl_coef` is above zero.
        kl_coef: weight of the low-variance KL estimate to the reference.
    """
    ratio_N = torch.exp(logprobs_N - old_logprobs_N)
    free_N = ratio_N * advantages_N
    bound_N = ratio_N.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages_N
    total = -torch.minimum(free_N, bound_N).sum()
    kl = torch.zeros(())
    if reference_logprobs_N is not None:
        gap_N = reference_logprobs_N - logprobs_N
        kl = (torch.exp(gap_N) - gap_N - 1).sum()
        total = total + kl_coef * kl
    return PolicyLoss(total, (free_N > bound_N).sum(), kl.detach())
