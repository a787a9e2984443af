import math

import pytest
import torch
from torch import nn

from components.core.training import losses
from components.core.training.losses import cosine_sum, counted, cross_entropy_sum, kl_sum, token_logprobs


def head(rows: list[list[float]]) -> nn.Linear:
    module = nn.Linear(len(rows[0]), len(rows), bias=False)
    module.weight = nn.Parameter(torch.tensor(rows))
    return module


IDENTITY = head([[1.0, 0.0], [0.0, 1.0]])


def test_kl_is_the_hand_computed_kl_in_nats():
    student = torch.log(torch.tensor([[0.25, 0.75]]))
    teacher = torch.log(torch.tensor([[0.5, 0.5]]))
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)

    assert kl_sum(student, teacher, IDENTITY, IDENTITY).item() == pytest.approx(expected)


def test_cosine_counts_the_angle_alone():
    student = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    teacher = torch.tensor([[5.0, 0.0], [1.0, 0.0], [1.0, 0.0]])

    assert float(cosine_sum(student, teacher)) == pytest.approx(0 + 1 + 2)


def test_chunks_give_the_same_loss_and_gradient_as_the_whole(monkeypatch):
    torch.manual_seed(0)
    lm_head = nn.Linear(8, 50, bias=False)
    hidden, labels = torch.randn(33, 8), torch.randint(50, (33,))

    def loss_and_gradient() -> tuple[float, torch.Tensor]:
        states = hidden.clone().requires_grad_(True)
        loss = cross_entropy_sum(states, labels, lm_head)
        loss.backward()
        assert states.grad is not None
        return loss.item(), states.grad

    whole, gradient = loss_and_gradient()
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 50 * 4)
    chunked, chunked_gradient = loss_and_gradient()

    assert chunked == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(chunked_gradient, gradient, atol=1e-6)


def test_only_labelled_positions_count():
    hidden = torch.arange(12.0).view(1, 6, 2)
    states, labels = counted(hidden, torch.tensor([[-100, 3, -100, 5, -100, -100]]))

    assert states.tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert labels.tolist() == [3, 5]


def test_log_probabilities_are_those_of_the_softmax():
    states = torch.tensor([[math.log(0.2), math.log(0.8)]])

    assert token_logprobs(states, torch.tensor([1]), IDENTITY).item() == pytest.approx(math.log(0.8))
