"""Reads the files of a tokenizer folder without the tokenizers library, so that `tessera plan` can use it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from components.core.base.errors import CheckpointError, TesseraError

MAX_BYTES = 256 << 20
"""Maximum size of a file that is parsed, bytes; the largest published vocabularies have a tenth of it."""
CHAT_TEMPLATE = "chat_template.jinja"
VOCABULARY, SETTINGS, NAMED_TOKENS = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn any error while a tokenizer is read into one that names the folder.

    Raises:
        CheckpointError: a file has impossible values, or the tokenizers library panicked.
    """
    try:
        yield
    except TesseraError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(
            f"the tokenizer of {folder.name} cannot be read: {str(error)[:200]}", hint="copy or download it again"
        ) from None


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of a tokenizer, with the tokens that older folders name in a file of their own.

    Raises:
        CheckpointError: a file is missing or damaged, or the end-of-sequence token is not named or not in the
            vocabulary: the toggle needs all of them.
    """
    with readable(folder):
        return _read_settings(folder)


def _read_settings(folder: Path) -> dict[str, Any]:
    settings = _read_object(folder, SETTINGS)
    if (folder / NAMED_TOKENS).is_file():
        named = {
            key: list(map(token_text, value)) if isinstance(value, list) else token_text(value)
            for key, value in _read_object(folder, NAMED_TOKENS).items()
            if value
        }
        settings = named | {key: value for key, value in settings.items() if value is not None}
    tokens = set(vocabulary(folder))
    if not settings.get("eos_token"):
        raise CheckpointError(
            f"the tokenizer of {folder.name} has no eos_token, which ends every answer",
            hint=f"set eos_token in {SETTINGS}",
        )
    end = token_text(settings["eos_token"])
    if end not in tokens:
        raise CheckpointError(
            f"the tokenizer of {folder.name} has eos_token {end!r}, which is not in its vocabulary",
            hint=f"set eos_token in {SETTINGS} to a token of {VOCABULARY}",
        )
    return settings


def end_token(folder: Path) -> str:
    """The text of a tokenizer's end-of-sequence token, from whichever file names it.

    Raises:
        CheckpointError: as in `read_settings`.
    """
    return token_text(read_settings(folder)["eos_token"])


DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens that pretraining puts behind each document, in the families that are supported."""


def document_end(folder: Path) -> str:
    """The token that the model's pretraining put behind each document.

    Tokenizers of chat models name the end of a turn as their end-of-sequence token, and have this one beside it.

    Raises:
        CheckpointError: as in `read_settings`.
    """
    end = end_token(folder)
    if end in DOCUMENT_ENDS:
        return end
    added = _read_object(folder, VOCABULARY).get("added_tokens", ())
    special = {token["content"] for token in added if token.get("special")}
    return next((token for token in DOCUMENT_ENDS if token in special), end)


def token_text(token: Any) -> str:
    """The text of a token, which settings contain as text or as an object."""
    return str(token.get("content", "") if isinstance(token, dict) else token)


def vocabulary(folder: Path) -> Iterator[str]:
    """Texts of all tokens of a tokenizer, those that were added too.

    Raises:
        CheckpointError: the file is missing or damaged.
    """
    yield from (text for _, text in token_ids(folder))


def token_ids(folder: Path) -> Iterator[tuple[int, str]]:
    """Id and text of the added tokens, and then of the vocabulary.

    Raises:
        CheckpointError: there is no vocabulary.
    """
    described = _read_object(folder, VOCABULARY)
    try:
        yield from ((int(token["id"]), token["content"]) for token in described.get("added_tokens", ()))
        pieces = described["model"]["vocab"]
        if isinstance(pieces, dict):
            yield from ((int(number), text) for text, number in pieces.items())
        else:  # Unigram models list their tokens with scores
            yield from ((number, text) for number, (text, _) in enumerate(pieces))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(
            f"the {VOCABULARY} of {folder.name} has no vocabulary", hint="copy or download it again"
        ) from None


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object that adding the toggle needs."""
    if not (folder / name).is_file():
        raise CheckpointError(
            f"the tokenizer of {folder.name} has no {name}, which the toggle needs",
            hint="save it as a fast tokenizer: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    try:
        if (folder / name).stat().st_size > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES:,} bytes")
        value = json.loads((folder / name).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"the {name} of {folder.name} is not JSON: {error}", hint="copy or download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"the {name} of {folder.name} is not a JSON object", hint="copy or download it again")
    return value
