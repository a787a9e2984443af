"""Greedy completions against picking the likeliest token of a whole forward pass, one token at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from components.core.model.decoder import TesseraForCausalLM
from components.core.training import greedy_decoding as greedy
from components.core.training.greedy_decoding import complete, complete_like
from tests.components.core.tiny_models import heterogeneous

EOS, LIMIT = 5, 6
PROMPTS = [[7, 8, 9], [11], [3, 3, 12, 20, 21], [14, 2]]


@pytest.fixture(scope="module")
def model() -> TesseraForCausalLM:
    return heterogeneous(0)


@torch.no_grad()
def one_by_one(model: TesseraForCausalLM, prompt: list[int], limit: int) -> list[int]:
    found: list[int] = []
    while len(found) < limit and EOS not in found:
        found.append(int(model(torch.tensor([prompt + found])).logits[0, -1].argmax()))
    return found


@pytest.fixture(scope="module")
def whole(model: TesseraForCausalLM) -> list[list[int]]:
    return [one_by_one(model, prompt, LIMIT) for prompt in PROMPTS]


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_a_completion_is_the_likeliest_token_each_time(
    model: TesseraForCausalLM, whole: list[list[int]], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(greedy, "ROWS", rows)
    assert complete(model, PROMPTS, [LIMIT] * 4, EOS) == whole
    short = [row[:limit] for row, limit in zip(whole, (1, 2, 3, 4), strict=True)]
    assert complete(model, PROMPTS, [1, 2, 3, 4], EOS) == short


@settings(max_examples=25)
@given(
    expected=st.lists(
        st.lists(st.integers(6, 30), min_size=1, max_size=LIMIT), min_size=len(PROMPTS), max_size=len(PROMPTS)
    ),
    agreed=st.lists(st.integers(0, LIMIT), min_size=len(PROMPTS), max_size=len(PROMPTS)),
)
def test_whatever_is_expected_the_completions_are_the_models_own(
    model: TesseraForCausalLM, whole: list[list[int]], expected: list[list[int]], agreed: list[int]
) -> None:
    drafts = [(own[:k] + draft)[:LIMIT] for own, draft, k in zip(whole, expected, agreed, strict=True)]
    for draft in drafts:
        if len(draft) < LIMIT:
            draft.append(EOS)
    assert complete_like(model, PROMPTS, drafts, LIMIT, EOS) == whole


def test_an_expectation_that_is_met_takes_one_pass(
    model: TesseraForCausalLM, whole: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = 0
    forward = type(model).forward

    def counted(*args: object, **inputs: object) -> object:
        nonlocal passes
        passes += 1
        return forward(*args, **inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(type(model), "forward", counted)
    assert complete_like(model, PROMPTS, whole, LIMIT, EOS) == whole
    assert passes == 1
