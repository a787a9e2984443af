"""What is refused before any work starts."""

import pytest

from pipelines.recipe.checks import find_faults
from pipelines.recipe.schema import Recipe


@pytest.mark.parametrize(
    ("corpus", "weights", "message"),
    [
        (["a", "b"], [0.7, 0.3], None),
        (["a"], [1], None),
        (["a", "b"], [], None),
        (["a" * 64], [0.7, 0.3], None),
        (["a", "b"], [1], "data.corpus_weights has 1 weights, and corpus names 2 corpora"),
        ([], [0.5, 0.5], "data.corpus_weights has 2 weights, and corpus names 0 corpora"),
        (["a", "b"], [1, 0.3333333], "data.corpus_weights: weights [1.0, 0.3333333] of a blend repeat only after"),
    ],
)
def test_each_corpus_of_a_blend_has_a_weight(corpus: list[str], weights: list[float], message: str | None) -> None:
    left_out = dict.fromkeys(("search", "distill", "pretrain", "sft", "rl", "eval", "deploy"))
    recipe = Recipe.parse({"name": "x", "corpus": corpus, "data": {"corpus_weights": weights}, **left_out})
    found = [fault.message for fault in find_faults(recipe) if "weights" in fault.message]
    assert [fault.startswith(message) for fault in found] == [True] if message else found == []
