"""Supervised fine-tuning on chats of both modes. Source: arXiv 2505.00949, section 4."""

from pathlib import Path

import torch
from pydantic import JsonValue
from tokenizers import Tokenizer

from components.core.base.errors import CheckpointError, DataError
from components.core.model.inspection import read_config, stored_dtype
from components.core.model.vocabulary import NewTokens
from components.core.runtime.context import StageContext
from components.core.text.chat import encode_chats
from components.core.text.example import DocumentList
from components.core.text.packing import PackedStream, read_rows
from components.core.text.toggle import END_THINK, THINK
from components.core.text.toggle_template import ROLE_TOKENS
from components.core.text.tokenizer import eos_token_id
from components.core.training.loop import train
from components.core.training.losses import next_token_loss
from components.core.training.sharding import load_student, save_trained
from components.sft.config import SftConfig


def run(
    config: SftConfig, *, context: StageContext, out: Path, model: Path, tokenizer: Path, chats: Path
) -> dict[str, JsonValue]:
    """Tune `model` on chats that think and on chats that do not; only answers count in the loss."""
    tokens = added_tokens(read_config(model)["vocab_size"], tokenizer, known=model / "tokenizer.json")
    student = load_student(model, config, context, tokens)
    student.config.eos_token_id = eos_token_id(tokenizer)
    examples = encode_chats(read_rows(chats / "train.jsonl"), tokenizer)
    fitting = [example for example in examples if len(example.token_ids) <= config.seq_len]
    if len(fitting) < len(examples):
        context.note(f"{len(examples) - len(fitting)} chats are longer than seq_len={config.seq_len} and were left out")
    if not fitting:
        raise DataError("there are no chats to learn from", hint="give the recipe `sft:` chats, or a larger seq_len")
    stored = stored_dtype(model)
    stream = PackedStream(DocumentList(fitting), config.seq_len, config.seed or 0)
    losses = train(student, stream, next_token_loss, config, context, stored)
    save_trained(student, out / "tuned", tokenizer=tokenizer, dtype=getattr(torch, stored))
    return {"loss": losses[-1], "num_steps": len(losses), "chats": len(fitting)}


MEANINGS = {
    THINK: "Let think step",
    END_THINK: "Therefore answer",
    **{role: role.strip("<|>") for role in ROLE_TOKENS},
}
"""For each token that the toggle may add, words that say what it stands for."""


def added_tokens(num_rows: int, tokenizer: Path, known: Path) -> NewTokens:
    """The tokens that the toggle has added, and words that say what each stands for.

    Args:
        num_rows: rows of the model's embedding.
        tokenizer: folder of the tokenizer with the toggle.
        known: the model's own tokenizer, whose tokens it was trained with.

    Raises:
        CheckpointError: the tokenizer has no tags.
    """
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    if vocabulary.token_to_id(THINK) is None or vocabulary.token_to_id(END_THINK) is None:
        raise CheckpointError(
            f"the tokenizer has no {THINK} and {END_THINK}, which the toggle needs",
            hint="use the tokenizer from the data stage",
        )
    old = set((Tokenizer.from_file(str(known)) if known.is_file() else vocabulary).get_vocab().values())
    trained = {number for number in old if number < num_rows}
    related = {
        number: words
        for token, meaning in MEANINGS.items()
        if (number := vocabulary.token_to_id(token)) is not None
        and number not in trained
        and (words := [word for word in vocabulary.encode(meaning, add_special_tokens=False).ids if word in trained])
    }
    return NewTokens(vocabulary.get_vocab_size(), related)
