"""Encodes chats with the template and its toggle, and parses replies in both modes.

Source: arXiv 2505.00949, section 4, and the model cards' chat template.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer

from components.core.base.errors import CheckpointError, DataError
from components.core.text.embedding_rows import refuse_tokens_without_row
from components.core.text.example import Example
from components.core.text.toggle import END_THINK, THINK, system_message
from components.core.text.toggle_template import ChatTemplate
from components.core.text.tokenizer_files import end_token

Mode = Literal["on", "off"]
_WITH_REASONING = re.compile(rf"\s*{THINK}(.*?){END_THINK}(.*)", re.DOTALL)


def check_turns(messages: Sequence[Mapping[str, str]]) -> None:
    """Refuse a chat that the template would render wrongly.

    Raises:
        ValueError: the order is not: an optional system message, then user and assistant in turn, assistant last.
    """
    roles = [message["role"] for message in messages]
    start = 1 if roles[:1] == ["system"] else 0
    for number, role in enumerate(roles[start:], start):
        expected = ("user", "assistant")[(number - start) % 2]
        if role != expected:
            raise ValueError(f"message {number + 1} is of role {role!r} where {expected!r} is due")
    if roles[-1:] != ["assistant"]:
        raise ValueError("the last message is not an answer of the assistant")


def encode_chats(rows: Iterable[Mapping[str, Any]], tokenizer_folder: Path) -> list[Example]:
    """Convert chat rows to examples. Only the last answer of a row counts in the loss, with its end token.

    Raises:
        DataError: the messages of a chat are out of order; the message names the row.
    """
    tokenizer, template, eos = _load(tokenizer_folder)
    chats = [row["messages"] for row in rows]
    for number, messages in enumerate(chats, 1):
        try:
            check_turns(messages)
        except ValueError as error:
            raise DataError(f"chat {number}: {error}", hint="read chats through the data stage") from None
    heads = template.render([messages[:-1] for messages in chats], add_generation_prompt=True)
    wholes = template.render(chats)
    tails = []
    for number, (head, whole) in enumerate(zip(heads, wholes, strict=True), 1):
        if not whole.startswith(head):
            raise DataError(
                f"chat {number}: the chat template changes what stands before the answer once the answer is there",
                hint="remove the chat template from the parent's folder; Tessera's own takes its place",
            )
        tails.append(_up_to_end(whole[len(head) :], eos))
    encoded = zip(_ids(tokenizer, heads), _ids(tokenizer, tails), strict=True)
    return [
        Example([*head_ids, *tail_ids], [False] * len(head_ids) + [True] * len(tail_ids))
        for head_ids, tail_ids in encoded
    ]


def _up_to_end(answer: str, eos: str) -> str:
    """An answer with its end token, without what a template writes between two turns."""
    text, _, _ = answer.rpartition(eos)
    return (text or answer) + eos


def prompt_ids(tokenizer_folder: Path, questions: Sequence[str], mode: str) -> list[list[int]]:
    """Token ids of the prompt of each question: a chat in one mode, up to the beginning of the answer.

    Raises:
        DataError: a token has no row in the embedding of the model.
    """
    tokenizer, template, _ = _load(tokenizer_folder)
    chats = [[system_message(mode), {"role": "user", "content": question}] for question in questions]
    encoded = _ids(tokenizer, template.render(chats, add_generation_prompt=True))
    refuse_tokens_without_row(encoded, tokenizer_folder, "the questions")
    return encoded


def parse_answer(text: str) -> tuple[str | None, str]:
    """Reasoning and answer of a reply; reasoning is None where the reply has no complete `<think>…</think>`."""
    match = _WITH_REASONING.fullmatch(text)
    return (match[1].strip(), match[2].strip()) if match else (None, text.strip())


def format_ok(text: str, mode: str) -> bool:
    """Whether a reply has the format of its mode.

    On: one non-empty `<think>…</think>` first, then a non-empty answer without tags. Off: a non-empty answer without
    tags.
    """
    reasoning, answer = parse_answer(text)
    if not answer or THINK in answer or END_THINK in answer:
        return False
    return bool(reasoning) and THINK not in str(reasoning) if mode == "on" else reasoning is None


@functools.lru_cache(maxsize=4)
def _load(folder: Path) -> tuple[Tokenizer, ChatTemplate, str]:
    """The tokenizer of a folder, its chat template, and its end-of-sequence token as text."""
    template = ChatTemplate.of(folder)
    if template is None:
        raise CheckpointError(
            f"the tokenizer of {folder.name} has no chat template", hint="use the tokenizer from the data stage"
        )
    return Tokenizer.from_file(str(folder / "tokenizer.json")), template, end_token(folder)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [list(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
