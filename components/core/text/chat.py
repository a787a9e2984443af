"""Encodes chats with the template and its toggle, and parses replies in both modes.

Source: arXiv 2505.00949, section 4, and the model cards' chat template.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from components.core.base.errors import DataError
from components.core.text.example import Example
from components.core.text.tokenizer_files import end_token

THINK, END_THINK = "<think>", "</think>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")

Mode = Literal["on", "off"]
_WITH_REASONING = re.compile(rf"\s*{THINK}(.*?){END_THINK}(.*)", re.DOTALL)


def system_message(mode: str) -> dict[str, str]:
    """The system message that switches detailed thinking."""
    return {"role": "system", "content": f"detailed thinking {mode}"}


def render(messages: Sequence[Mapping[str, str]], *, eos: str, add_generation_prompt: bool = False) -> str:
    """The text of a chat, equal to that of `apply_chat_template` for a tokenizer with our template."""
    return _template().render(messages=messages, eos_token=eos, add_generation_prompt=add_generation_prompt)


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
    tokenizer, eos = _load(tokenizer_folder)
    heads, tails = [], []
    for number, row in enumerate(rows, 1):
        messages = row["messages"]
        try:
            check_turns(messages)
        except ValueError as error:
            raise DataError(f"chat {number}: {error}", hint="read chats through the data stage") from None
        head = render(messages[:-1], eos=eos, add_generation_prompt=True)
        heads.append(head)
        tails.append(render(messages, eos=eos)[len(head) :])
    examples = []
    encoded = zip(_ids(tokenizer, heads), _ids(tokenizer, tails), strict=True)
    for head_ids, tail_ids in encoded:
        examples.append(Example([*head_ids, *tail_ids], [False] * len(head_ids) + [True] * len(tail_ids)))
    return examples


def prompt_ids(tokenizer_folder: Path, questions: Sequence[str], mode: str) -> list[list[int]]:
    """Token ids of the prompt of each question: a chat in one mode, up to the beginning of the answer."""
    tokenizer, eos = _load(tokenizer_folder)
    texts = [
        render([system_message(mode), {"role": "user", "content": question}], eos=eos, add_generation_prompt=True)
        for question in questions
    ]
    return _ids(tokenizer, texts)


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


def plain_answer(text: str) -> str:
    """The answer of a base model: the text after the last colon of its completion; all of it without a colon."""
    return text.rsplit(":", 1)[-1].strip()


def has_toggle(tokenizer_folder: Path) -> bool:
    """Whether the tokenizer of a folder has both tags as single tokens, and a chat template."""
    if not (tokenizer_folder / "tokenizer.json").is_file():
        return False
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    tags = all(tokenizer.token_to_id(tag) is not None for tag in (THINK, END_THINK))
    return tags and (tokenizer_folder / "chat_template.jinja").is_file()


@functools.cache
def _template() -> Template:
    return ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(TEMPLATE)


@functools.lru_cache(maxsize=4)
def _load(folder: Path) -> tuple[Tokenizer, str]:
    """The tokenizer of a folder, and its end-of-sequence token as text."""
    return Tokenizer.from_file(str(folder / "tokenizer.json")), end_token(folder)


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return [list(encoding.ids) for encoding in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
