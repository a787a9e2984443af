"""What the data stage needs, takes and makes."""

from collections.abc import Mapping
from typing import ClassVar, Self

from pydantic import Field, model_validator

from components.core.base.config import Config
from components.core.runtime.stage import Input, Output, Stage


class ArithmeticConfig(Config):
    """The demo's world: chains of one-digit operations modulo 10, worked from left to right."""

    renamed_keys: ClassVar[Mapping[str, str]] = {"hard_share": "hard_fraction"}

    standard_levels: tuple[int, int] = (1, 5)
    """Fewest and most operations of a standard problem."""
    hard_levels: tuple[int, int] = (8, 10)
    """Fewest and most operations of a hard problem: the longest there are."""
    hard_fraction: float = Field(default=0.04, ge=0, le=1)
    """Share of hard problems among those drawn for training. Short ones repeat, and repeats are dropped, so that the
    share of those kept is larger: 0.056 with the defaults."""
    num_train: int = Field(default=36000, gt=0)
    """Training problems."""
    num_chats: int = Field(default=9000, gt=0)
    """Training problems that are also told as chats, each in both modes."""
    num_validation: int = Field(default=400, gt=0)
    """Validation problems, hard ones in the training's share."""
    num_test: int = Field(default=250, gt=0)
    """Test problems, of the standard and of the hard split each."""

    @model_validator(mode="after")
    def _levels_apart(self) -> Self:
        low, high = self.standard_levels
        hard_low, hard_high = self.hard_levels
        if not 1 <= low <= high < hard_low <= hard_high:
            raise ValueError(f"levels must rise: standard {low} to {high}, hard {hard_low} to {hard_high}")
        return self


class DataConfig(Config):
    """Corpus, chats and problems, and the tokenizer they are read with."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "test_share": "test_fraction",
        "validation_share": "validation_fraction",
    }

    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """The world that is made where the user gives no corpus."""
    vocab_size: int = Field(default=320, ge=280)
    """Tokens of a tokenizer trained on the fly; a parent's own tokenizer keeps its size."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of what a user's rows ask held out for validation, chosen by hash."""
    test_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Share of a user's problems held out for the test, chosen by hash; those of the top third of levels, where rows
    have a `level`, are the hard test."""
    skip_bad: bool = False
    """Leave malformed lines, and corpus files that are no text, out instead of refusing them."""
    nemo_packed: int = Field(default=0, ge=0)
    """Also write the chats packed to this many tokens, in NeMo's packed-sequence form; 0 for not."""
    seed: int | None = None
    """Seed of everything made; the recipe's seed where not given."""


STAGE = Stage(
    name="data",
    config=DataConfig,
    inputs={
        "parent": Input("model", "a model whose tokenizer is taken over and given the toggle", optional=True),
        "own_corpus": Input("data", "text files, or JSONL with rows {text}", optional=True),
        "own_chats": Input("data", "JSONL with rows {messages}, or {input, output, reasoning, …}", optional=True),
        "own_problems": Input("data", "JSONL with rows {question, answer}, or also {id, level}", optional=True),
    },
    outputs={
        "tokenizer": Output("tokenizer", "the tokenizer with `<think>`, `</think>` and the chat template"),
        "corpus": Output("data", "train.jsonl and validation.jsonl, rows {text} or {prompt, completion}"),
        "chats": Output("data", "train.jsonl and validation.jsonl, rows {messages, reasoning}"),
        "problems": Output(
            "data", "train, validation, test-standard and test-hard .jsonl, rows {id, question, prompt, answer, level}"
        ),
    },
    entry="components.data.stage:run",
    doc="Make the demo's world of arithmetic, or read a user's own files, and settle the tokenizer.",
    source="arXiv 2505.00949, section 3",
)
