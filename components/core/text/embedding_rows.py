"""Finds tokens of a model's tokenizer that its embedding has no row for. Imports no torch.

Such tokens are usual (a padding token that was added later), and harmless until one is met in a text.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from components.core.base.errors import DataError
from components.core.text.tokenizer_files import token_ids

WAY_OUT = "remove the token from the text, or add rows to the parent: model.resize_token_embeddings(len(tokenizer))"


def embedding_rows(folder: Path) -> int | None:
    """Rows of the embedding of a model folder; None for a tokenizer without a model."""
    file = folder / "config.json"
    return int(json.loads(file.read_text(encoding="utf-8"))["vocab_size"]) if file.is_file() else None


def tokens_without_row(folder: Path) -> dict[int, str]:
    """Tokens that the embedding has no row for, by id; none for a tokenizer without a model."""
    rows = embedding_rows(folder)
    return {} if rows is None else {number: text for number, text in token_ids(folder) if number >= rows}


def refuse_tokens_without_row(texts: Iterable[Sequence[int]], folder: Path, place: str) -> None:
    """Refuse texts with a token that the embedding has no row for.

    Args:
        texts: token ids of each text.
        folder: the model that the texts are for.
        place: what the texts are, for the message.

    Raises:
        DataError: with the token, its id and the rows that there are.
    """
    rows = embedding_rows(folder)
    if rows is None:
        return
    met = [
        (number, next(token for token in ids if token >= rows))
        for number, ids in enumerate(texts, 1)
        if ids and max(ids) >= rows
    ]
    if met:
        number, token = met[0]
        raise DataError(
            f"text {number} of {place} has the token {tokens_without_row(folder).get(token)!r} with id {token}, and "
            f"the embedding of {folder.name} has {rows} rows; {len(met)} texts have such tokens",
            hint=WAY_OUT,
        )
