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


def faults(**values: object) -> list[str]:
    """What is wrong with a recipe of these values and nothing else but the data stage."""
    left_out = dict.fromkeys(("search", "distill", "pretrain", "sft", "rl", "eval", "deploy"))
    return [str(fault) for fault in find_faults(Recipe.parse({"name": "x", **left_out, **values}))]


def test_tasks_of_reasoning_gym_are_there_and_take_their_settings() -> None:
    pytest.importorskip("reasoning_gym")
    easy = {"chain_sum": {"num_train": 500, "settings": {"max_terms": 3}}, "leg_counting": 500}
    assert faults(parent="a" * 64, data={"reasoning_gym": easy}, sft={}, rl={}, eval={}) == []
    assert faults(parent="a" * 64, data={"reasoning_gym": {"leg_count": 5, "chain_sum": 5}}) == [
        "data.reasoning_gym: reasoning-gym has no task 'leg_count'\n  hint: did you mean 'leg_counting'?"
    ]
    (refused,) = faults(parent="a" * 64, data={"reasoning_gym": {"chain_sum": {"num_train": 5, "settings": {"a": 1}}}})
    assert refused.startswith('data.reasoning_gym.chain_sum: the task refuses its settings {"a":1}')


def test_problems_of_reasoning_gym_are_no_text_to_search_on() -> None:
    found = faults(parent="a" * 64, data={"reasoning_gym": {"chain_sum": 5}}, search={}, sft={})
    assert found[0].startswith("with data.reasoning_gym, search/importance, search/library")
    assert "need corpus too" in found[0]
