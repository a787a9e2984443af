"""What each option of distillation is worth: `python -m tests.bench.distillation OUT`.

A parent of eight layers learns the help texts of Python (`pydoc_data.topics`, in every Python). A child is five of its
layers; for each option and seed it begins anew and is distilled on the same rows for as many steps. What counts is
its perplexity on held-out text; the tokens are a processor second's, teacher included.

Rows: `value` is the mean over the seeds, `versus` that of the default with the spread of both, `ratio` above 1 where
the option is better.
"""

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import NamedTuple

import torch

from components.core.model.checkpoint import load_model, model_config
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import quiet_context
from components.core.text.packing import Batch, RowStream, corpus_stream, load_batches
from components.core.training.loop import train
from components.core.training.losses import counted, cross_entropy_sum, distillation_loss, hidden_states, paired_layers
from components.core.training.train_config import TrainConfig
from components.data.config import DataConfig
from components.distill.config import DistillConfig
from components.pretrain.config import Shape
from tests.bench.rows import Row, tell, write_rows
from tests.bench.toy_parent import train_toy_parent

SHAPE = Shape(
    hidden_size=64,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=192,
    initializer_range=0.06,
)
KEPT = (0, 1, 3, 5, 7)
"""Layers of the parent that are the child."""
VOCABULARY, SEQ_LEN, BATCH = 512, 128, 8
PARENT_STEPS, DISTIL_STEPS = 300, 60
SEEDS = range(3)
DEFAULT = "default: cosine"
OPTIONS: dict[str, dict[str, object]] = {
    DEFAULT: {},
    "hidden_state_loss: mse": {"hidden_state_loss": "mse"},
    "hidden_state_loss: null": {"hidden_state_loss": None},
    "top_k_logits: 64": {"top_k_logits": 64},
    "top_k_logits: 8": {"top_k_logits": 8},
    "hidden_state_loss: null, top_k_logits: 8": {"hidden_state_loss": None, "top_k_logits": 8},
}


class Result(NamedTuple):
    """A distilled child: perplexity on held-out text, and tokens of its training a processor second."""

    perplexity: float
    tokens_per_s: float


@dataclass(frozen=True)
class World:
    """The trained parent, and text."""

    parent: TesseraForCausalLM
    folder: Path
    corpus: Path
    held_out: Sequence[Batch]

    def rows(self, seed: int) -> RowStream:
        """Training rows in an order of their own."""
        return corpus_stream(self.corpus, self.folder, "train", seq_len=SEQ_LEN, seed=seed)


def main() -> None:
    """Measure all options in turn, write the rows."""
    found: dict[str, list[Result]] = {name: [] for name in OPTIONS}
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        before = perplexity(child_of(world.parent), world.held_out)
        rows = [Row("perplexity, parent", perplexity(world.parent, world.held_out), "")]
        rows.append(Row("perplexity, child before distillation", before, ""))
        for seed in SEEDS:
            for name in list(OPTIONS)[:: 1 if seed % 2 == 0 else -1]:
                found[name].append(distilled(world, seed, OPTIONS[name]))
                tell(f"seed {seed}, {name}: {found[name][-1]}")
    write_rows([*rows, *rows_of(found)], Path(sys.argv[1]))


def make_world(folder: Path) -> World:
    """Cut the texts into paragraphs, and train the parent."""
    texts = folder / "texts"
    texts.mkdir()
    rows = [json.dumps({"text": part}) for text in topics.values() for part in passages(text)]
    (texts / "topics.jsonl").write_text("\n".join(rows), encoding="utf-8")
    data = DataConfig(vocab_size=VOCABULARY, seed=0)
    trained = train_toy_parent(folder, data, SHAPE, PARENT_STEPS, seq_len=SEQ_LEN, batch_size=BATCH, own_corpus=texts)
    corpus = folder / "data" / "corpus"
    held_out = load_batches(corpus, trained, "validation", seq_len=SEQ_LEN, batch_size=BATCH, limit=16)
    return World(load_model(trained).requires_grad_(False), trained, corpus, held_out)


def passages(text: str, size: int = 1000) -> Iterator[str]:
    """A text in pieces of whole paragraphs, of this many characters or more."""
    piece = ""
    for paragraph in text.split("\n\n"):
        piece += f"{paragraph}\n\n"
        if len(piece) >= size:
            yield piece
            piece = ""
    if piece.strip():
        yield piece


def child_of(parent: TesseraForCausalLM) -> TesseraForCausalLM:
    """The kept layers of the parent, with its embedding and head."""
    values = parent.config.to_dict()
    blocks = [values["block_configs"][layer] for layer in KEPT]
    depths = [layer + 1 for layer in KEPT]
    child = TesseraForCausalLM(
        model_config(values | {"num_hidden_layers": len(KEPT), "block_configs": blocks, "parent_layers": depths})
    )
    layers = [parent.model.layers[layer] for layer in KEPT]
    for own, theirs in zip(child.model.layers, layers, strict=True):
        own.load_state_dict(theirs.state_dict())
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        child.get_submodule(name).load_state_dict(parent.get_submodule(name).state_dict())
    return child


def distilled(world: World, seed: int, options: Mapping[str, object]) -> Result:
    """Distil a child anew with these options."""
    training = TrainConfig(
        num_steps=DISTIL_STEPS,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        seq_len=SEQ_LEN,
        learning_rate=2e-3,
        compile=False,
        seed=seed,
    )
    config = DistillConfig.model_validate({**training.model_dump(), **options})
    child, stream = child_of(world.parent), world.rows(seed)
    pairs = paired_layers(world.parent, child)
    loss = distillation_loss(world.parent, pairs, config.hidden_state_loss, config.top_k_logits)
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        train(child, stream, loss, config, quiet_context(Path(folder)))
        seconds = time.process_time() - began
    return Result(perplexity(child, world.held_out), DISTIL_STEPS * BATCH * SEQ_LEN / seconds)


@torch.no_grad()
def perplexity(model: TesseraForCausalLM, batches: Sequence[Batch]) -> float:
    """Of the tokens that count."""
    total, tokens = 0.0, 0
    for batch in batches:
        hidden_ND, labels_N = counted(hidden_states(model, batch)[-1], batch.labels_BT)
        total, tokens = total + float(cross_entropy_sum(hidden_ND, labels_N, model.lm_head)), tokens + len(labels_N)
    return math.exp(total / tokens)


def rows_of(found: Mapping[str, Sequence[Result]]) -> Iterator[Row]:
    """Perplexity and speed of each option beside the default."""
    default = found[DEFAULT]
    for name, results in found.items():
        of_default, own = ([result.perplexity for result in each] for each in (default, results))
        versus = "" if name == DEFAULT else f"{DEFAULT} {in_words(of_default)}; here {in_words(own)}"
        ratio = statistics.fmean(of_default) / statistics.fmean(own)
        yield Row(f"perplexity, {name}", statistics.fmean(own), "", versus or in_words(own), ratio)
    for name, results in found.items():
        speeds = [statistics.median(result.tokens_per_s for result in each) for each in (results, default)]
        yield Row(f"tokens, {name}", speeds[0], "tokens/s", f"{DEFAULT}: {speeds[1]:.0f}", speeds[0] / speeds[1])


def in_words(values: Sequence[float]) -> str:
    """The values of all seeds."""
    return " ".join(f"{value:.2f}" for value in values)


if __name__ == "__main__":
    main()
