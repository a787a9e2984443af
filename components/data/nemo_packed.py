"""Chats as NeMo's packed sequences, for teams that fine-tune with NeMo.

NeMo packs with the functions used here and keeps a row a pack: `input_ids`, `loss_mask`, `seq_start_id`. Its own
`.npy` file is a pickle, which Tessera never writes, so the rows go into Parquet under the same names.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from components.core.batches import eos_token_id
from components.core.chat import encode_chats
from components.core.rows import Row


def write_packed(chats: Sequence[Row], tokenizer: Path, folder: Path, pack_size: int, seed: int) -> None:
    """Write `nemo-packed.parquet` and `nemo-packed.json` (NeMo's packing metadata) into `folder`.

    Args:
        chats: rows {messages}.
        tokenizer: the tokenizer they are read with.
        folder: existing folder.
        pack_size: tokens of a pack; longer chats are left out.
        seed: order of equally long chats.
    """
    from nemo.utils import sequence_packing_utils as nemo

    examples = encode_chats(chats, tokenizer)
    items = [
        {"input_ids": list(example.token_ids), "loss_mask": list(example.counts)}
        for example in examples
        if len(example.token_ids) <= pack_size
    ]
    sequences, histogram = nemo.create_hist(items, pack_size)
    assignments, metadata = nemo.create_packing_strategy(histogram, pack_size, "first_fit_decreasing")
    np.random.seed(seed)  # NeMo draws from numpy's global state
    packs = nemo.fill_packing_strategy(assignments, sequences, pack_size, eos_token_id(tokenizer))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(packs), folder / "nemo-packed.parquet")
    (folder / "nemo-packed.json").write_text(json.dumps(metadata, indent=2) + "\n")
