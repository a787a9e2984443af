import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

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


def plain_cross_entropy(hidden: Tensor, labels: Tensor, lm_head: nn.Linear) -> Tensor:
    return F.cross_entropy(lm_head(hidden).float(), labels, reduction="sum")


def plain_kl(student: Tensor, teacher: Tensor, student_head: nn.Linear, teacher_head: nn.Linear) -> Tensor:
    logits = [module(states).float() for module, states in ((student_head, student), (teacher_head, teacher.detach()))]
    student_logprobs, teacher_logprobs = (F.log_softmax(values, dim=-1) for values in logits)
    return F.kl_div(student_logprobs, teacher_logprobs.detach(), reduction="sum", log_target=True)


def value_and_gradients(
    loss: Callable[..., Tensor], hidden: Tensor, *rest: Any, lm_head: nn.Linear, scale: float
) -> list[Tensor]:
    states = hidden.clone().requires_grad_(True)
    lm_head.zero_grad()
    value = loss(states, *rest)
    (value * scale).sum().backward()
    assert states.grad is not None
    assert lm_head.weight.grad is not None
    return [value.detach(), states.grad, lm_head.weight.grad.clone()]


CASES = {
    "rows": st.integers(0, 40),
    "vocabulary": st.integers(2, 60),
    "chunk_rows": st.integers(1, 50),
    "scale": st.floats(0.1, 10),
    "seed": st.integers(0, 1000),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@contextmanager
def computed_in(dtype: torch.dtype, chunk_logits: int) -> Iterator[None]:
    """Chunks of so many logits, and matrix products in this type."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "CHUNK_LOGITS", chunk_logits)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            yield


def assert_alike(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    """Equal up to the rounding of the type."""
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for value, wanted in zip(found, expected, strict=True):
        assert value.dtype == wanted.dtype == torch.float32
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance * max(1.0, largest))


@DTYPES
@settings(max_examples=60)
@given(**CASES)
def test_cross_entropy_and_its_gradients_are_those_of_plain_pytorch(dtype, rows, vocabulary, chunk_rows, scale, seed):
    torch.manual_seed(seed)
    lm_head, hidden, labels = nn.Linear(8, vocabulary, bias=False), torch.randn(rows, 8), torch.randint(2, (rows,))
    arguments: dict[str, Any] = {"lm_head": lm_head, "scale": scale}
    with computed_in(dtype, chunk_rows * vocabulary):
        found = value_and_gradients(cross_entropy_sum, hidden, labels, lm_head, **arguments)
        expected = value_and_gradients(plain_cross_entropy, hidden, labels, lm_head, **arguments)
    assert_alike(found, expected, dtype)


@DTYPES
@settings(max_examples=60)
@given(**CASES)
def test_kl_and_its_gradients_are_those_of_plain_pytorch(dtype, rows, vocabulary, chunk_rows, scale, seed):
    torch.manual_seed(seed)
    heads = nn.Linear(8, vocabulary, bias=False), nn.Linear(5, vocabulary, bias=False)
    states = torch.randn(rows, 8), torch.randn(rows, 5, requires_grad=True)
    arguments: dict[str, Any] = {"lm_head": heads[0], "scale": scale}
    with computed_in(dtype, chunk_rows * vocabulary):
        found = value_and_gradients(kl_sum, *states, *heads, **arguments)
        expected = value_and_gradients(plain_kl, *states, *heads, **arguments)
        with torch.no_grad():
            assert_alike([kl_sum(*states, *heads)], found[:1], dtype)
    assert_alike(found, expected, dtype)
    assert states[1].grad is None
    assert heads[1].weight.grad is None


@settings(max_examples=60)
@given(**CASES)
def test_log_probabilities_and_their_gradients_are_those_of_plain_pytorch(rows, vocabulary, chunk_rows, scale, seed):
    torch.manual_seed(seed)
    lm_head, hidden, labels = nn.Linear(8, vocabulary, bias=False), torch.randn(rows, 8), torch.randint(2, (rows,))
    weights = torch.randn(rows)

    def weighted(logprobs: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda states: logprobs(states, labels, lm_head) * weights

    def plain(states: Tensor, labels: Tensor, lm_head: nn.Linear) -> Tensor:
        return F.log_softmax(lm_head(states), dim=-1).gather(1, labels[:, None])[:, 0]

    arguments: dict[str, Any] = {"lm_head": lm_head, "scale": scale}
    with computed_in(torch.float32, chunk_rows * vocabulary):
        found = value_and_gradients(weighted(token_logprobs), hidden, **arguments)
        expected = value_and_gradients(weighted(plain), hidden, **arguments)
    assert_alike(found, expected, torch.float32)


def test_a_frozen_head_gets_no_gradient():
    student_head = nn.Linear(4, 6, bias=False).requires_grad_(False)
    student = torch.randn(3, 4, requires_grad=True)
    kl_sum(student, torch.randn(3, 4), student_head, nn.Linear(4, 6, bias=False)).backward()

    assert student.grad is not None
    assert student_head.weight.grad is None


@pytest.mark.parametrize(("rows", "vocabulary"), [(0, 5), (1, 5), (7, 5), (100, 1), (33, 1000)])
def test_chunks_hold_no_more_logits_than_allowed_and_cover_every_row_once(monkeypatch, rows, vocabulary):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", 50)
    seen: list[int] = []

    def chunk_loss(logits: Tensor, chunk: slice) -> Tensor:
        assert logits.numel() <= max(50, vocabulary)
        seen.extend(range(rows)[chunk])
        return logits.sum()

    losses._chunked_sum(torch.randn(rows, 2), nn.Linear(2, vocabulary, bias=False), chunk_loss)
    assert seen == list(range(rows))


def test_only_labelled_positions_count():
    hidden = torch.arange(12.0).view(1, 6, 2)
    states, labels = counted(hidden, torch.tensor([[-100, 3, -100, 5, -100, -100]]))

    assert states.tolist() == [[2.0, 3.0], [6.0, 7.0]]
    assert labels.tolist() == [3, 5]


def test_log_probabilities_are_those_of_the_softmax():
    states = torch.tensor([[math.log(0.2), math.log(0.8)]])

    assert token_logprobs(states, torch.tensor([1]), IDENTITY).item() == pytest.approx(math.log(0.8))
