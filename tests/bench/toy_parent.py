"""The parent of a benchmark in a small world: data are made, and a model learns them from nothing."""

from pathlib import Path

from components.core.runtime.context import quiet_context
from components.core.runtime.placement import Placement
from components.data.config import STAGE as DATA
from components.data.config import DataConfig
from components.data.stage import run as make_data
from components.pretrain.config import PretrainConfig, Shape
from components.pretrain.stage import run as pretrain


def train_toy_parent(
    folder: Path,
    data: DataConfig,
    shape: Shape,
    num_steps: int,
    *,
    seq_len: int,
    batch_size: int,
    own_corpus: Path | None = None,
    threads: int = 1,
) -> Path:
    """Write the outputs of the data stage to `folder/data`, and train a parent on their corpus; returns its folder.

    Args:
        folder: takes everything.
        data: what is made.
        shape: of the parent.
        num_steps: of its training.
        seq_len: tokens of a row.
        batch_size: rows of a step.
        own_corpus: text for `data`.
        threads: of the training.
    """
    made, out = folder / "data", folder / "parent"
    for output in DATA.outputs:
        (made / output).mkdir(parents=True)
    make_data(data, context=quiet_context(folder), out=made, own_corpus=own_corpus)
    config = PretrainConfig(
        num_steps=num_steps,
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        seq_len=seq_len,
        learning_rate=2e-3,
        seed=0,
        shape=shape,
    )
    context = quiet_context(out)
    context.placement = Placement(threads=threads)
    pretrain(config, context=context, out=out, tokenizer=made / "tokenizer", corpus=made / "corpus")
    return out / "trained"
