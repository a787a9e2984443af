"""Configuration and declaration of the data stage."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Self

from pydantic import BeforeValidator, Field, JsonValue, model_validator

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


class ReasoningTask(Config):
    """Problems of one task of reasoning-gym; a number stands for `num_train`."""

    num_train: int = Field(gt=0)
    """Training problems; `validation_fraction` and `test_fraction` of as many are held out besides."""
    settings: Mapping[str, JsonValue] = Field(default={})
    """Fields of the task's configuration in reasoning-gym that are not to have their defaults, such as `max_terms`."""


def _task(value: object) -> object:
    """A number stands for a task with its own settings."""
    return {"num_train": value} if isinstance(value, int) and not isinstance(value, bool) else value


class DataConfig(Config):
    """Corpus, chats and problems, and their tokenizer."""

    renamed_keys: ClassVar[Mapping[str, str]] = {
        "test_share": "test_fraction",
        "validation_share": "validation_fraction",
    }

    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """Problems that are generated where the user gives no files, and no `reasoning_gym`."""
    reasoning_gym: Mapping[
        str, Annotated[ReasoningTask, BeforeValidator(_task, json_schema_input_type=ReasoningTask | int)]
    ] = Field(default={})
    """Problems that reasoning-gym makes, by task: `{chain_sum: 500}`, or `{chain_sum: {num_train: 500, settings:
    {max_terms: 4}}}`. They are for `rl` and `eval`, with the task's own score of an answer, from 0 to 1, and become
    chats without thinking for `sft`. They are added to a user's own."""
    vocab_size: int = Field(default=320, ge=280)
    """Size of the vocabulary of a new tokenizer; the tokenizer of a parent keeps its size."""
    corpus_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weights of the corpora that the recipe names, in the same order: the fraction of the packed rows that each gives,
    exact to one row at any time. None: they are one corpus."""
    validation_fraction: float = Field(default=0.05, gt=0, lt=0.5)
    """Fraction of the distinct questions in a user's rows that is held out for validation, chosen by hash; for each
    task of `reasoning_gym`, as many problems besides those for training."""
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
            "data",
            "train, validation, test-standard and test-hard .jsonl, rows {id, question, prompt, answer, level}, and "
            "{verifier} where reasoning-gym made them",
        ),
    },
    entry="components.data.stage:run",
    doc="Generate arithmetic problems, or read a user's own files, and make the tokenizer.",
    source="arXiv 2505.00949, section 3",
)
