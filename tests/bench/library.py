"""The block library trained side by side against one variant at a time: part of `make bench-search`.

Both are our own code on one thread: `distil` with all variants of all layers, and again for each of them alone, with a
forward pass of the parent of its own (up to the variant's layer, no further). What they write is compared byte by byte.
"""

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import quiet_context
from components.core.text.example import DocumentList, Example
from components.core.text.packing import PackedStream
from components.search.config import Distillation
from components.search.library.local_distillation import distil
from components.search.space.layer_space import Part, Variant
from components.search.space.subblocks import BlockKey, Subblock, build_subblock, initialise, subblock_weights
from tests.bench.growth import Growth, plot_growths
from tests.bench.rows import tell

HEADS, VOCABULARY, STEPS, ROUNDS = 8, 256, 3, 3

Row = dict[str, Any]


class Size(NamedTuple):
    """What is trained: variants of each layer of a parent, and on how much text a step."""

    layers: int
    options: int
    rows: int
    tokens: int = 128
    hidden: int = 128

    @property
    def name(self) -> str:
        """As it stands in the rows."""
        text = f"{self.rows} x {self.tokens} tokens"
        return f"{self.layers} layers of hidden {self.hidden} x {self.options} variants, {text}"


BASE = Size(layers=6, options=8, rows=2)
SIZES = (
    BASE,
    *(BASE._replace(layers=layers) for layers in (3, 12)),
    *(BASE._replace(options=options) for options in (4, 16)),
    *(BASE._replace(rows=rows) for rows in (1, 4)),
)
GROWTHS = {"layers": "layers", "variants a layer": "options", "rows of 128 tokens": "rows"}


class Timed(NamedTuple):
    """All variants of one size, trained both ways.

    Attributes:
        size: what was trained.
        variants: how many.
        together_s: CPU seconds side by side.
        alone_s: CPU seconds one at a time.
        same: whether both wrote the same bytes.
    """

    size: Size
    variants: int
    together_s: float
    alone_s: float
    same: bool


def measure() -> list[Row]:
    """Measure every size, tell of it, and plot how seconds grow."""
    found: list[Timed] = []
    rows: list[Row] = []
    for size in SIZES:
        found.append(_timed(size))
        for row in _rows_of(found[-1]):
            rows.append(row)
            tell(f"{row['name']}: {row['value']:.4g} {row['unit']} versus {row['versus']:.4g}")
    growths = [_growth(what, field, found) for what, field in GROWTHS.items()]
    plot_growths(Path(__file__).with_name("library.svg"), growths, "one at a time")
    return rows


def _growth(what: str, field: str, found: Sequence[Timed]) -> Growth:
    """The sizes that differ from the first in one number alone."""
    base = found[0].size
    along = sorted(
        (timed for timed in found if timed.size._replace(**{field: getattr(base, field)}) == base),
        key=lambda timed: int(getattr(timed.size, field)),
    )
    numbers = [int(getattr(timed.size, field)) for timed in along]
    return Growth(what, numbers, [timed.together_s for timed in along], [timed.alone_s for timed in along])


def _timed(size: Size) -> Timed:
    """Train both ways; the first size several times."""
    with tempfile.TemporaryDirectory() as folder:
        parent, keys, stream = _parent(size, Path(folder)), _keys(size), _stream(size)
        together_s, alone_s, same = [], [], True
        for number in range(ROUNDS if size == BASE else 1):
            here = Path(folder) / str(number)
            together_s.append(_train(parent, [keys], stream, size, here / "together"))
            alone_s.append(_train(parent, [[key] for key in keys], stream, size, here / "alone"))
            same = same and _weights(here / "together") == _weights(here / "alone")
    return Timed(size, len(keys), statistics.median(together_s), statistics.median(alone_s), same)


def _rows_of(timed: Timed) -> list[Row]:
    """Variants and tokens a second, and whether the results are the same."""
    size, name = timed.size, f"library/{timed.size.name}"
    together, alone = timed.variants / timed.together_s, timed.variants / timed.alone_s
    tokens = STEPS * size.rows * size.tokens
    return [
        _row(f"{name}: variants trained a CPU second ({STEPS} steps)", together, "1/s", alone),
        _row(f"{name}: variants x tokens a CPU second", together * tokens, "tokens/s", alone * tokens),
        _row(f"{name}: same weights to the bit", float(timed.same), "of 1", 1.0),
    ]


def _train(
    parent: TesseraForCausalLM, groups: list[list[BlockKey]], stream: PackedStream, size: Size, folder: Path
) -> float:
    """CPU seconds of training groups of variants one after another."""

    def make(key: BlockKey) -> Subblock:
        own = subblock_weights(parent.model.layers[key[0]].state_dict(), key[1].part)
        importance_I = torch.arange(4.0 * size.hidden)
        weights = initialise(own, key[1], importance_I=importance_I, head_dim=parent.config.head_dim)
        return build_subblock(parent, *key, weights)

    jobs = [quiet_context(folder.parent / f"{folder.name}-job-{number}") for number in range(len(groups))]
    config = Distillation(num_steps=STEPS, skip_below_error=0)
    began = time.process_time()
    for group, context in zip(groups, jobs, strict=True):
        distil(parent, group, make, folder, stream, size.rows, config, context)
    return time.process_time() - began


def _parent(size: Size, folder: Path) -> TesseraForCausalLM:
    """A random Llama: what is timed does not depend on its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=size.tokens,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "parent")
    return load_model(folder / "parent").requires_grad_(False)


def _keys(size: Size) -> list[BlockKey]:
    """Three attentions, and FFN widths evenly spread."""
    attentions: list[tuple[Part, int]] = [("attention", heads) for heads in (4, 2, 1)][: size.options // 2]
    widths = size.options - len(attentions)
    ffns: list[tuple[Part, int]] = [("ffn", 4 * size.hidden * n // (widths + 1)) for n in range(1, widths + 1)]
    return [(layer, Variant(part, count)) for layer in range(size.layers) for part, count in attentions + ffns]


def _stream(size: Size) -> PackedStream:
    """Random text."""
    letters = random.Random(0)
    text = [[letters.randrange(1, VOCABULARY) for _ in range(size.tokens)] for _ in range(64)]
    return PackedStream(DocumentList([Example(tokens, [True] * size.tokens) for tokens in text]), size.tokens, 0)


def _weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.safetensors")}


def _row(name: str, value: float, unit: str, versus: float) -> Row:
    """One line of the result; the ratio says how many times more ours is."""
    return {"name": name, "value": value, "unit": unit, "versus": versus, "ratio": value / versus}


if __name__ == "__main__":
    torch.set_num_threads(1)
    Path(sys.argv[1]).write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
