"""The switch of detailed thinking: its tags, its system message, and whether a tokenizer has it.

Source: arXiv 2505.00949, section 4.
"""

from pathlib import Path

from components.core.text.tokenizer_files import CHAT_TEMPLATE, VOCABULARY, vocabulary

THINK, END_THINK = "<think>", "</think>"


def system_message(mode: str) -> dict[str, str]:
    """The system message that switches detailed thinking."""
    return {"role": "system", "content": f"detailed thinking {mode}"}


def has_toggle(tokenizer_folder: Path) -> bool:
    """Whether the tokenizer of a folder has both tags as single tokens, and a chat template."""
    if not (tokenizer_folder / VOCABULARY).is_file():
        return False
    has_tags = {THINK, END_THINK}.issubset(vocabulary(tokenizer_folder))
    return has_tags and (tokenizer_folder / CHAT_TEMPLATE).is_file()
