import math
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from components.rl.config import Loss, RlConfig
from components.rl.grpo import Learner, group_advantages, policy_loss, with_weights
from components.rl.rollout import Answer, Problem, Reward
from tests.components.core import tiny_models
from tests.components.pretend_gpu import GPU, GPUS, assert_same, computes_on_gpu


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
    loss = policy_loss(
        torch.tensor([math.log(ratio)]), torch.zeros(1), torch.tensor([advantage]), clip_range=(0.8, 1.2)
    )

    assert float(loss.total) == pytest.approx(expected, rel=1e-5)


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=2), min_size=1, max_size=5),
    st.randoms(use_true_random=False),
)
def test_losses_are_those_of_their_papers_answer_by_answer(lengths, random):
    """The gradient at the old policy is a weight for each token: by hand, from the formula of each paper."""
    group_size, groups, longest = 2, len(lengths), 64
    rewards = [[random.choice([0.0, 0.2, 1.2]) for _ in range(group_size)] for _ in lengths]
    answers = [
        [answer([9] * length, [-1.0] * length, reward) for length, reward in zip(*group, strict=True)]
        for group in zip(lengths, rewards, strict=True)
    ]
    num_tokens = sum(map(sum, lengths))
    for loss in get_args(Loss):
        found = [
            item.advantage * item.weight / num_tokens
            for item in with_weights(answers, RlConfig(loss=loss, max_tokens=longest))
        ]
        expected = []
        for group_rewards, group_lengths in zip(rewards, lengths, strict=True):
            mean = sum(group_rewards) / group_size
            spread = (sum((reward - mean) ** 2 for reward in group_rewards) / group_size) ** 0.5
            for reward, length in zip(group_rewards, group_lengths, strict=True):
                others = (sum(group_rewards) - reward) / (group_size - 1)
                relative = (reward - mean) / spread if spread > 1e-6 else 0.0
                expected.append(
                    {
                        "dapo": relative / num_tokens,
                        "grpo": relative / length / (groups * group_size),
                        "dr_grpo": (reward - mean) / longest / (groups * group_size),
                        "rloo": (reward - others) / (groups * group_size),
                    }[loss]
                )
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_the_upper_clip_may_be_higher_than_the_lower_one():
    logprobs = torch.tensor([math.log(1.25), math.log(0.75)])
    loss = policy_loss(logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), clip_range=(0.8, 1.28))

    assert float(loss.total) == pytest.approx(-1.25 + 0.8, rel=1e-5)
    assert int(loss.clipped) == 1


def test_weights_act_on_surrogate_and_kl_but_not_on_what_is_counted():
    logprobs, old, advantages = torch.tensor([0.1, 0.3]), torch.zeros(2), torch.tensor([1.0, 2.0])
    options: dict[str, Any] = {"clip_range": (0.8, 1.2), "reference_logprobs_N": torch.ones(2), "kl_coef": 0.5}
    parts = [
        policy_loss(
            *(v[i : i + 1] for v in (logprobs, old, advantages)), **{**options, "reference_logprobs_N": torch.ones(1)}
        )
        for i in range(2)
    ]
    both = policy_loss(logprobs, old, advantages, weights_N=torch.tensor([3.0, 0.5]), **options)

    assert float(both.total) == pytest.approx(3 * float(parts[0].total) + 0.5 * float(parts[1].total), rel=1e-5)
    assert float(both.kl) == pytest.approx(sum(float(part.kl) for part in parts), rel=1e-5)


def test_no_gradient_flows_where_the_clip_acts():
    logprobs = torch.tensor([math.log(1.5), 0.0], requires_grad=True)
    policy_loss(logprobs, torch.zeros(2), torch.ones(2), clip_range=(0.8, 1.2)).total.backward()

    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([0.0, -1.0])


def test_kl_to_the_reference_is_zero_at_the_reference_and_positive_elsewhere():
    same = policy_loss(
        torch.zeros(3),
        torch.zeros(3),
        torch.zeros(3),
        clip_range=(0.8, 1.2),
        reference_logprobs_N=torch.zeros(3),
        kl_coef=1.0,
    )
    other = policy_loss(
        torch.zeros(3),
        torch.zeros(3),
        torch.zeros(3),
        clip_range=(0.8, 1.2),
        reference_logprobs_N=torch.ones(3),
        kl_coef=1.0,
    )

    assert float(same.kl) == 0.0
    assert float(other.total) == pytest.approx(3 * (math.e - 2), rel=1e-5)


PROMPT, RIGHT, WRONG = [7, 8], [9, 10, 1], [11, 1]
PROBLEM = Problem("p", PROMPT, "4", "on")


def answer(tokens: list[int], logprobs: list[float], reward: float, *, truncated: bool = False) -> Answer:
    return Answer(PROBLEM, tuple(tokens), tuple(logprobs), 0, truncated, Reward(reward, reward > 0, True))


def logprobs_of(model: Any, tokens: list[int], temperature: float) -> Tensor:
    """By plain PyTorch, without packing."""
    logits_TV: Tensor = model(torch.tensor([PROMPT + tokens])).logits[0, len(PROMPT) - 1 : -1]
    return (logits_TV / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_step_is_the_mean_over_all_answer_tokens_at_the_temperature_with_truncated_weights(monkeypatch, kl_coef):
    """Two groups, one of them without an advantage; the engine was 0.1 and 3 nats off. By hand, answer by answer."""
    temperature, learner_model, by_hand = 0.7, tiny_models.heterogeneous(0), tiny_models.heterogeneous(0)
    engine = {1.0: (logprobs_of(by_hand, RIGHT, temperature) - 0.1).tolist()}
    engine[0.0] = (logprobs_of(by_hand, WRONG, temperature) - 3.0).tolist()
    groups = [
        [answer(RIGHT, engine[1.0], 1.0), answer(WRONG, engine[0.0], 0.0)],
        [answer(WRONG, engine[0.0], 0.0), answer(WRONG, engine[0.0], 0.0)],
    ]
    config = RlConfig(temperature=temperature, kl_coef=kl_coef, updates_per_step=1, micro_batch_size=3, warmup_steps=0)
    learner = Learner(learner_model, config)
    found: list[Tensor] = []
    monkeypatch.setattr(learner.optimizer, "step", lambda: found.append(gradient(learner_model)))
    metrics = learner.learn(groups)

    loss = torch.zeros(())
    for tokens, advantage, weight in (
        (RIGHT, 1.0, math.exp(0.1)),
        (WRONG, -1.0, 2.0),
        (WRONG, 0.0, 2.0),
        (WRONG, 0.0, 2.0),
    ):
        logprobs = logprobs_of(by_hand, tokens, temperature)
        loss = loss - (logprobs - logprobs.detach()).exp().sum() * advantage * weight
    (loss / (len(RIGHT) + 3 * len(WRONG))).backward()  # the gradient of the KL is zero at the reference
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)

    torch.testing.assert_close(found[0], gradient(by_hand), rtol=1e-3, atol=1e-6)
    assert metrics["max_log_ratio"] == pytest.approx(3.0, abs=1e-4)
    measured = [0.1] * 3 + [3.0] * (2 if kl_coef == 0 else 6)  # answers without a gradient are not computed
    assert metrics["log_ratio"] == pytest.approx(sum(measured) / len(measured), abs=1e-4)


def test_the_kl_term_acts_on_answers_without_an_advantage():
    model = tiny_models.heterogeneous(0)
    learner = Learner(model, RlConfig(kl_coef=1.0, updates_per_step=1, warmup_steps=0))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)  # away from the reference
    logprobs = logprobs_of(model, WRONG, 1.0).tolist()
    alike = [[answer(WRONG, logprobs, 0.0), answer(WRONG, logprobs, 0.0)]]

    assert learner.learn(alike)["kl"] > 0
    assert Learner(model, RlConfig(updates_per_step=1)).learn(alike) == {}


def test_later_updates_are_clipped_against_the_learner_before_the_first_one():
    model = tiny_models.heterogeneous(0)
    groups = [[answer(t, logprobs_of(model, t, 1.0).tolist(), r) for t, r in ((RIGHT, 1.0), (WRONG, 0.0))]] * 2
    config = RlConfig(updates_per_step=2, learning_rate=0.05, warmup_steps=0)
    metrics = Learner(model, config).learn(groups)

    assert metrics["max_log_ratio"] < 1e-4  # both shares are compared with the engine before the weights change
    assert metrics["clipped"] > 0


def test_truncated_answers_can_be_left_out_of_the_loss():
    model = tiny_models.heterogeneous(0)
    right, wrong = (logprobs_of(model, tokens, 1.0).tolist() for tokens in (RIGHT, WRONG))
    groups = [[answer(RIGHT, right, 1.0), answer(WRONG, wrong, 0.0, truncated=True)]]

    def norm(masked: bool) -> float:
        config = RlConfig(mask_truncated=masked, updates_per_step=1, warmup_steps=0)
        return Learner(tiny_models.heterogeneous(0), config).learn(groups)["grad_norm"]

    by_hand = tiny_models.heterogeneous(0)
    (-logprobs_of(by_hand, RIGHT, 1.0).mean()).backward()  # its advantage is 1
    assert norm(masked=True) == pytest.approx(gradient(by_hand).norm().item(), rel=1e-3)
    assert norm(masked=False) != pytest.approx(norm(masked=True), rel=1e-2)


@pytest.mark.parametrize("pretended", GPUS)
def test_the_learner_and_its_reference_compute_on_the_device_of_the_policy(pretended):
    groups = [[answer(RIGHT, [-1.0] * 3, 1.0), answer(WRONG, [-2.0] * 2, 0.0)]] * 2

    def learned(device: torch.device) -> dict[str, Tensor]:
        model = tiny_models.heterogeneous(0)
        model.to(device)
        Learner(model, RlConfig(kl_coef=0.1, updates_per_step=2, warmup_steps=0)).learn(groups)
        return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}

    expected = learned(torch.device("cpu"))
    with computes_on_gpu(pretended):
        found = learned(GPU)
    assert_same(found, expected, pretended)


def test_the_learner_computes_in_its_dtype_also_before_the_first_update():
    model = tiny_models.heterogeneous(0)
    right, wrong = (logprobs_of(model, tokens, 1.0).tolist() for tokens in (RIGHT, WRONG))
    groups = [[answer(RIGHT, right, 1.0), answer(WRONG, wrong, 0.0)]] * 2

    def log_ratio(dtype: Literal["float32", "bfloat16"]) -> float:
        config = RlConfig(dtype=dtype, updates_per_step=2, learning_rate=1e-9, warmup_steps=0)
        return Learner(tiny_models.heterogeneous(0), config).learn(groups)["log_ratio"]

    assert log_ratio("float32") < 1e-4
    assert 1e-4 < log_ratio("bfloat16") < 0.1
