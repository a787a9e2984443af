"""A few steps of the small size of `training.py`, for `real.py --quick`: `python -m tests.bench.real_training OUT`.

It needs accelerate in its path, as `training.py` does.
"""

import sys
from pathlib import Path

import torch

from tests.bench.rows import Row, in_turn, write_rows
from tests.bench.training import SIZES, hugging_face, ours

STEPS, ROUNDS = 4, 3


def main() -> None:
    """Measure, and write the row."""
    torch.set_num_threads(1)
    size = SIZES[0]._replace(steps=STEPS)
    vocabulary, count = size.shape["vocab_size"], size.batch_size * size.steps
    rows = torch.randint(vocabulary, (count, size.seq_len), generator=torch.Generator().manual_seed(0)).tolist()
    ours(size._replace(steps=2), rows)  # compiles
    found = in_turn({"ours": lambda: ours(size, rows), "theirs": lambda: hugging_face(size, rows)}, ROUNDS)
    versus = f"transformers.Trainer, tokens/s: {found['theirs']:.0f}"
    name = f"training, {size.name}"
    write_rows([Row(name, found["ours"], "tokens/s", versus, found["ours"] / found["theirs"])], Path(sys.argv[1]))


if __name__ == "__main__":
    main()
