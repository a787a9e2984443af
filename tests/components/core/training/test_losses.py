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

from components.core.model.layers import rms_norm
from components.core.training import losses
from components.core.training.losses import cosine_sum, counted, cross_entropy_sum, kl_sum, mse_sum, token_logprobs


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


TWO_HEADS = CASES | {"rows": st.integers(1, 40), "top_k": st.integers(1, 70)}


def coarse(logits: Tensor, top: Tensor) -> Tensor:
    """Probabilities of the top tokens, and of all others together."""
    probs = logits.softmax(dim=-1)
    return torch.cat([probs.gather(1, top), probs.scatter(1, top, 0.0).sum(dim=-1, keepdim=True)], dim=1)


def plain_top_k_kl(
    student: Tensor, teacher: Tensor, student_head: nn.Linear, teacher_head: nn.Linear, k: int
) -> Tensor:
    """KL of the distributions over the teacher's k most likely tokens and the rest; the rest may be empty."""
    teacher_logits = teacher_head(teacher).detach()
    top = teacher_logits.topk(min(k, teacher_logits.shape[1])).indices
    teacher_probs, student_probs = coarse(teacher_logits, top), coarse(student_head(student), top)
    kl: Tensor = torch.special.xlogy(teacher_probs, teacher_probs / student_probs.clamp_min(1e-300)).sum()
    return kl


@settings(max_examples=60)
@given(**TWO_HEADS)
def test_the_kl_of_the_top_tokens_and_its_gradients_are_those_of_plain_pytorch(
    rows, vocabulary, chunk_rows, scale, seed, top_k
):
    torch.manual_seed(seed)
    heads = nn.Linear(8, vocabulary, bias=False).double(), nn.Linear(5, vocabulary, bias=False).double()
    states = torch.randn(rows, 8).double(), torch.randn(rows, 5).double()
    with computed_in(torch.float32, chunk_rows * vocabulary):
        arguments: dict[str, Any] = {"lm_head": heads[0], "scale": scale}
        found = value_and_gradients(kl_sum, *states, *heads, top_k, **arguments)
        expected = value_and_gradients(plain_top_k_kl, *states, *heads, top_k, **arguments)
        with torch.no_grad():
            torch.testing.assert_close(kl_sum(*states, *heads, top_k), found[0])
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


@settings(max_examples=60)
@given(**TWO_HEADS)
def test_more_top_tokens_bring_the_kl_closer_to_that_of_all(rows, vocabulary, chunk_rows, scale, seed, top_k):
    """Tokens that are counted as one hide differences, and never make one."""
    torch.manual_seed(seed)
    heads = nn.Linear(8, vocabulary, bias=False), nn.Linear(5, vocabulary, bias=False)
    states = torch.randn(rows, 8) * scale, torch.randn(rows, 5) * scale
    with computed_in(torch.float32, chunk_rows * vocabulary), torch.no_grad():
        kls = [float(kl_sum(*states, *heads, k)) for k in (top_k, top_k + 1)]
        whole = float(kl_sum(*states, *heads))
    assert -1e-4 <= kls[0] <= kls[1] + 1e-4 <= whole + 2e-4
    if top_k >= vocabulary:
        assert kls[0] == whole


def test_the_kl_of_the_top_tokens_stays_finite_where_the_rest_is_all_but_impossible():
    student = torch.tensor([[60.0, -60.0, -60.0]], requires_grad=True)
    teacher = torch.tensor([[math.log(2), 0.0, 0.0]])
    identity = head(torch.eye(3).tolist())
    kl_sum(student, teacher, identity, identity, 1).backward()

    assert student.grad is not None
    torch.testing.assert_close(student.grad, torch.tensor([[0.5, -0.25, -0.25]]))


@settings(max_examples=30)
@given(rows=st.integers(0, 20), size=st.integers(1, 24), seed=st.integers(0, 1000), has_norm=st.booleans())
def test_the_squared_difference_and_its_gradient_are_those_of_plain_pytorch(rows, size, seed, has_norm):
    torch.manual_seed(seed)
    student, teacher, weight = (
        torch.randn(rows, size).double(),
        torch.randn(rows, size).double(),
        torch.rand(size).double(),
    )
    student.requires_grad_()

    def plain_norm(states: Tensor) -> Tensor:
        return F.rms_norm(states, (size,), weight, 1e-5) if has_norm else states

    found = mse_sum(student, teacher, (lambda states: rms_norm(states, weight, 1e-5)) if has_norm else None)
    expected = (plain_norm(student) - plain_norm(teacher)).square().mean(dim=-1).sum()
    torch.testing.assert_close(found, expected)
    for value, wanted in zip(*(torch.autograd.grad(each, student) for each in (found, expected)), strict=True):
        torch.testing.assert_close(value, wanted)


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
