"""Chats as NeMo's packed sequences, for teams that fine-tune with NeMo.

NeMo packs with the functions used here and keeps a row a pack: `input_ids`, `loss_mask`, `seq_start_id`. Its own
`.npy` file is a pickle, which Tessera never writes, so the rows go into Parquet under the same names.
"""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from components.core.base.errors import DataError
from components.core.text.chat import encode_chats
from components.core.text.row_files import Row
from components.core.text.tokenizer import eos_token_id

Item = dict[str, Any]
"""A chat's or a pack's token ids and loss mask, under NeMo's names."""


def write_packed(chats: Sequence[Row], tokenizer: Path, folder: Path, pack_size: int, seed: int) -> int:
    """Write `nemo-packed.parquet` and `nemo-packed.json` (NeMo's packing metadata) into `folder`.

    Args:
        chats: rows {messages}.
        tokenizer: the tokenizer they are read with.
        folder: existing folder.
        pack_size: tokens of a pack; longer chats are left out.
        seed: order of equally long chats.

    Returns:
        How many chats were packed.

    Raises:
        DataError: no chat is short enough.
    """
    items = [
        {"input_ids": list(example.token_ids), "loss_mask": list(example.counts)}
        for example in encode_chats(chats, tokenizer)
        if len(example.token_ids) <= pack_size
    ]
    if not items:
        raise DataError(
            f"none of {len(chats)} chats fits into nemo_packed={pack_size} tokens",
            hint="give chats, raise data.nemo_packed, or set it to 0",
        )
    packs, metadata = _pack(items, pack_size, eos_token_id(tokenizer), seed)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(packs), folder / "nemo-packed.parquet")
    (folder / "nemo-packed.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return len(items)


def _pack(items: Sequence[Item], pack_size: int, pad: int, seed: int) -> tuple[list[Item], dict[str, float]]:
    """NeMo's packs and metadata, without its log and progress bars."""
    from nemo.utils import logging
    from nemo.utils import sequence_packing_utils as nemo

    with logging.temp_verbosity(logging.ERROR), contextlib.redirect_stderr(io.StringIO()):  # where tqdm writes
        sequences, histogram = nemo.create_hist(items, pack_size)
        assignments, metadata = nemo.create_packing_strategy(histogram, pack_size, "first_fit_decreasing")
        np.random.seed(seed)  # NeMo draws from numpy's global state
        return nemo.fill_packing_strategy(assignments, sequences, pack_size, pad), metadata
