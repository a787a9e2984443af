from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.core.model.checkpoint import save_model
from components.core.model.vocabulary import NewRows, NewTokens, grow_vocabulary
from tests.components.core.dense_models import VOCAB_SIZE, twin, variety


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(torch.arange(2, 42).reshape(2, 20)).logits
    return found


@pytest.mark.parametrize("name", ["llama", "llama, tied"])
def test_new_tokens_start_near_related_ones_and_old_ones_stay(name: str, tmp_path: Path) -> None:
    model = twin(variety(name))
    before, old = logits(model), model.model.embed_tokens.weight.detach().clone()
    new, other = VOCAB_SIZE, VOCAB_SIZE + 1
    grow_vocabulary(model, NewTokens(VOCAB_SIZE + 2, {new: [3, 4], other: [5]}))
    rows = model.model.embed_tokens.weight.detach()
    assert len(rows) == model.config.vocab_size == 64 * (VOCAB_SIZE // 64 + 1)
    torch.testing.assert_close(logits(model)[..., :VOCAB_SIZE], before)
    for row, words in ((rows[new], old[3] + old[4]), (rows[other], old[5])):
        torch.testing.assert_close(row / row.norm(), words / words.norm())
        assert row.norm().item() == pytest.approx(old.norm(dim=1).median().item(), rel=1e-5)
    torch.testing.assert_close(rows[-1], old.mean(dim=0))
    save_model(model, tmp_path / "out", tokenizer=None)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.vocab_size == len(rows)
    torch.testing.assert_close(logits(again), logits(model))


def test_a_vocabulary_with_rows_to_spare_keeps_its_size_and_starts_those_of_new_tokens() -> None:
    model = twin(variety("llama"))
    old = model.lm_head.weight.detach().clone()
    grow_vocabulary(model, NewTokens(VOCAB_SIZE - 5, {VOCAB_SIZE - 6: [1]}))
    assert model.lm_head.weight.shape == old.shape
    torch.testing.assert_close(
        model.lm_head.weight[VOCAB_SIZE - 6] / old[1],
        torch.ones_like(old[1]) * (old.norm(dim=1).median() / old[1].norm()),
    )
    assert torch.equal(model.lm_head.weight[: VOCAB_SIZE - 6], old[: VOCAB_SIZE - 6])


def test_new_rows_from_pieces_are_those_of_the_whole_matrix() -> None:
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    tokens = NewTokens(12, {3: [0, 9], 11: [5]})
    whole = NewRows.computed([(0, rows)], tokens)
    pieces = NewRows.computed([(start, rows[start : start + 3]) for start in range(0, 10, 3)], tokens)
    expected, found = torch.cat([rows, torch.zeros(2, 4)]), torch.cat([rows, torch.zeros(2, 4)])
    whole.write(expected, 0)
    for start in (0, 5, 10):
        pieces.write(found[start : start + 5], start)

    torch.testing.assert_close(found, expected)
    assert torch.equal(expected[10], rows.mean(dim=0))
    assert torch.equal(found[[0, 1, 2, 4, 5, 6, 7, 8, 9]], rows[[0, 1, 2, 4, 5, 6, 7, 8, 9]])
