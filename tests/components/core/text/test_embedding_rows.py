import json
from pathlib import Path

import pytest

from components.core.base.errors import DataError
from components.core.text.chat import prompt_ids
from components.core.text.corpus.encoding import load_corpus
from components.core.text.embedding_rows import tokens_without_row
from pipelines.recipe.checks import find_notes
from pipelines.recipe.schema import Recipe
from tests.components.core import tiny_models

ROWS = tiny_models.TOKENS.index("t")
REFUSED = rf"has the token 't' with id {ROWS}, and the embedding of parent has {ROWS} rows; 1 texts have such tokens"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A parent whose embedding ends before the letter t."""
    folder = tmp_path_factory.mktemp("models") / "parent"
    return tiny_models.write(tiny_models.llama(0, vocab_size=ROWS), folder)


def corpus(folder: Path, *texts: str) -> Path:
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def test_tokens_without_a_row_are_those_after_the_last_row(parent: Path, tmp_path: Path) -> None:
    assert tokens_without_row(parent) == dict(enumerate("tuvwxyz", ROWS))
    whole = tiny_models.write(tiny_models.llama(0), tmp_path / "whole")
    assert tokens_without_row(whole) == {}
    (whole / "config.json").unlink()
    assert tokens_without_row(whole) == {}  # a tokenizer has no rows to miss


def test_a_text_with_such_a_token_is_refused_with_token_id_and_rows(parent: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"text 2 of the train corpus {REFUSED}") as error:
        load_corpus(corpus(tmp_path, "fine", "eighty"), parent, "train")
    assert "resize_token_embeddings" in str(error.value.hint)
    assert len(load_corpus(corpus(tmp_path, "a sip", "on a hill"), parent, "train")) == 2


def test_a_question_with_such_a_token_is_refused(parent: Path, tmp_path: Path) -> None:
    questions = ["6*7", "six times seven"]
    rows = tiny_models.write(tiny_models.llama(0), tmp_path / "whole")
    assert len(prompt_ids(rows, questions, "on")) == 2
    with pytest.raises(DataError, match=f"embedding of parent has {ROWS} rows"):
        prompt_ids(parent, questions, "on")


def test_a_plan_notes_them_before_any_text_is_read(parent: Path) -> None:
    left_out = dict.fromkeys(("search", "distill", "rl", "eval", "deploy"))
    recipe = Recipe.parse({"name": "own", "parent": str(parent), **left_out})
    expected = f"7 tokens of its tokenizer have no row in its embedding of {ROWS} rows, such as 't' with id {ROWS}"
    assert sum(expected in note for note in find_notes(recipe)) == 1
