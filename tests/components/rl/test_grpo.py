import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from components.rl.grpo import group_advantages, policy_loss


def test_advantages_are_deviations_from_the_group_in_its_own_units():
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 3.0, 3.0, 3.0]]))

    assert advantages[0].tolist() == pytest.approx([1.0, -1.0, -1.0, 1.0], abs=1e-4)
    assert advantages[1].tolist() == [0.0, 0.0, 0.0, 0.0]


@given(st.lists(st.floats(0, 2), min_size=2, max_size=8), st.floats(0.5, 3), st.floats(-1, 1))
def test_advantages_do_not_depend_on_scale_and_offset_of_the_reward(rewards, scale, offset):
    first = torch.tensor([rewards], dtype=torch.float64)
    if float(first.std(correction=0)) < 1e-2:
        return

    assert torch.allclose(group_advantages(first), group_advantages(first * scale + offset), atol=1e-3)


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected"),
    [(1.0, 2.0, -2.0), (1.5, 1.0, -1.2), (1.5, -1.0, 1.5), (0.5, -1.0, 0.8), (0.5, 1.0, -0.5)],
)
def test_policy_loss_is_the_clipped_surrogate_by_hand(ratio, advantage, expected):
    loss = policy_loss(torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), clip_ratio=0.2)

    assert float(loss.total) == pytest.approx(expected, rel=1e-5)


def test_no_gradient_flows_where_the_clip_acts():
    logprobs = torch.tensor([math.log(1.5), 0.0], requires_grad=True)
    policy_loss(logprobs, torch.zeros(2), torch.ones(2), clip_ratio=0.2).total.backward()

    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, -1.0])


def test_kl_to_the_reference_is_zero_at_the_reference_and_positive_elsewhere():
    same = policy_loss(
        torch.zeros(3), torch.zeros(3), torch.zeros(3), clip_ratio=0.2, reference_logprobs_N=torch.zeros(3), kl_coef=1.0
    )
    other = policy_loss(
        torch.zeros(3), torch.zeros(3), torch.zeros(3), clip_ratio=0.2, reference_logprobs_N=torch.ones(3), kl_coef=1.0
    )

    assert float(same.kl) == 0.0
    assert float(other.total) == pytest.approx(3 * (math.e - 2), rel=1e-5)
