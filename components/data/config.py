"""Configuration and declaration of the data stage."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage


class ArithmeticConfig(Config):
    """Generated problems: chains of one-digit operations modulo 10, computed from left to right."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"hard_share": "hard_fraction"}

    standard_levels: tuple[int, int] = (1, 5)
    """Fewest and most operations of a standard problem."""
    hard_levels: tuple[int, int] = (8, 10)
    """Fewest and most operations of a hard problem."""
    hard_fraction: float = Field(default=0.04, ge=0, le=1)
    """Fraction of hard problems among those drawn for training. Repeated problems, mostly short ones, are dropped, so
    that the fraction that remains is larger: 0.056 with the defaults."""
    num_train: int = Field(default=36000, gt=0)
    """Training problems."""
    num_chats: int = Field(default=9000, gt=0)
    """Training problems that also become chats, each in both modes."""
    num_validation: int = Field(default=400, gt=0)
    """Validation problems, with the same fraction of hard ones."""
    num_test: int = Field(default=250, gt=0)
    """Test problems in each of the two splits, standard and hard."""

    @model_validator(mode="after")
    def _levels_apart(self) -> Self:
        low, high = self.standard_levels
        hard_low, hard_high = self.hard_levels
        if not 1 <= low <= high < hard_low <= hard_high:
            raise ValueError(f"levels must rise: standard {low} to {high}, hard {hard_low} to {hard_high}")
        return self


class DataConfig(Config):
    """Corpus, chats and problems, and their tokenizer."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "test_share": "test_fraction",
        "validation_share": "validation_fraction",
    }

    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """Problems that are generated where the user gives no files."""
    vocab_size: int = Field(default=320, ge=280)
    """Size of the vocabulary of a new tokenizer; the tokenizer of a parent keeps its size."""
    corpus_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weights of the corpora that the recipe names, in the same order: the fraction of the packed rows that each gives,
    exact to one row at any time. None: they are one corpus."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Fraction of the distinct questions in a user's rows that is held out for validation, chosen by hash."""
    test_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Fraction of a user's problems held out for testing, chosen by hash; those of the top third of levels, where rows
    have a `level`, form the hard split."""
    skip_bad: bool = False
    """Skip malformed lines and binary corpus files instead of refusing them."""
    nemo_packed: int = Field(default=0, ge=0)
    """Also write the chats in NeMo's packed-sequence format, with packs of this many tokens; 0: do not."""
    seed: int | None = None
    """Random seed; the recipe's seed by default."""


STAGE = Stage(
    name="data",
    config=DataConfig,
    inputs={
        "parent": Input("model", "a model whose tokenizer is used, with the toggle added", optional=True),
        "own_corpus": Input("data", "text files, or rows {text}", optional=True),
        "own_chats": Input("data", "chats: {messages}, ShareGPT, Alpaca, {input, output, …}", optional=True),
        "own_problems": Input("data", "rows {question, answer, id?, level?}, GSM8K, DAPO or verl rows", optional=True),
    },
    outputs={
        "tokenizer": Output("tokenizer", "the tokenizer with `<think>`, `</think>` and the chat template"),
        "corpus": Output(
            "data",
            "train and validation .jsonl, rows {text} or {prompt, completion}, and their tokens as .bin and .idx",
        ),
        "chats": Output("data", "train.jsonl and validation.jsonl, rows {messages, reasoning}"),
        "problems": Output(
            "data", "train, validation, test-standard and test-hard .jsonl, rows {id, question, prompt, answer, level}"
        ),
    },
    entry="components.data.stage:run",
    doc="Generate arithmetic problems, or read a user's own files, and make the tokenizer.",
    source="arXiv 2505.00949, section 3",
)
