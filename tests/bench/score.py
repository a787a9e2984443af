"""Replace-one-block scores beside Puzzletron's: `make bench-search`, or `python -m tests.bench.score OUT`.

A small Llama is trained on sums for a few seconds. Both sides score the same variants of it on the same text, on one
thread, in float32; `puzzletron_scoring.py` says how Puzzletron's code is made to run here. Then the floating-point
operations of a larger model are counted, and how seconds grow with layers, options and tokens.
"""

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from components.core.model.architecture import LINEAR
from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import quiet_context
from components.core.text.packing import Batch
from components.search.scoring.replace_one_block import Replacements, Scores, score_replacements
from components.search.space.layer_space import PARTS, Part, Size, Variant
from components.search.space.subblocks import (
    BlockKey,
    Subblock,
    build_subblock,
    initialise,
    subblock_weights,
    with_replaced,
)
from pipelines.run.progress import StageState
from tests.bench.environment import environment
from tests.bench.growth import Growth, plot_growths
from tests.bench.rows import tell

PEER = (
    "nvidia-modelopt==0.47.0",
    "pulp==3.3.2",
    "omegaconf==2.3.0",
    "antlr4-python3-runtime==4.9.3",
    "immutabledict==4.2.1",
    "hydra-core==1.3.2",
    "typeguard==4.4.2",
)
LETTERS = "0123456789+= "
ROWS, TOKENS = 16, 128
STEPS, STEP_ROWS = 150, 8
ROUNDS = 3
TARGET_RATIO, TARGET_SHARE, TARGET_ERROR = 20.0, 0.25, 0.15
EARLY = 0.05

Row = dict[str, Any]


def main() -> None:
    """Measure, print, write."""
    rows = measure()
    Path(sys.argv[1]).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def measure() -> list[Row]:
    """All rows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        rows = beside_puzzletron(Path(name))
    rows += operations()
    rows.append(time_left())
    rows += growth(Path(__file__).with_name("score.svg"))
    for row in rows:
        tell(f"{row['name']}: {row['value']} {row['unit']} versus {row['versus']}")
    return rows


def beside_puzzletron(folder: Path) -> list[Row]:
    """Seconds a variant of both, and how far their scores are apart."""
    parent = trained_parent(folder / "parent")
    variants = variants_of(parent, kv_heads=(2, 1), widths=(0.75, 0.5, 0.25))
    batch = sums_text(ROWS, TOKENS, seed=1)
    write_for_puzzletron(folder, variants, batch)
    theirs = puzzletron(folder)
    ours_s, scores = [], None
    for _ in range(ROUNDS):
        began = time.process_time()
        scores = scored(parent, variants, batch)
        ours_s.append((time.process_time() - began) / len(variants))
    assert scores is not None
    ours = [float(scores.sums[key].sum() / scores.tokens_R.sum()) for key in variants]
    apart = max(abs(a - b) for a, b in zip(ours, theirs["kl"], strict=True))
    second = statistics.median(ours_s)
    name = f"score/{len(variants)} variants, 4 layers, hidden 64, {ROWS} x {TOKENS} tokens"
    return [
        row(f"{name}: CPU seconds a variant", second, "s", statistics.median(theirs["seconds"])),
        row(
            f"{name}: the same, Puzzletron's building of models left out",
            second,
            "s",
            statistics.median(theirs["losses_seconds"]),
        ),
        row(f"{name}: largest difference of KL to Puzzletron's", apart, "nats", 0.0),
        row(
            f"{name}: share of naive operations",
            scoring_flops(parent, variants, batch) / naive_flops(parent, variants, batch),
            "share",
            TARGET_SHARE,
        ),
    ]


def operations() -> list[Row]:
    """Operations at 12 layers of hidden size 256 with the paper's options."""
    parent = untrained(num_layers=12, hidden=256, heads=8, width=800, vocabulary=1024)
    variants = variants_of(parent, kv_heads=(4, 2, 1), widths=(0.87, 0.75, 0.5, 0.25, 0.2, 0.1), linear=True)
    batch = random_text(1, TOKENS // 2, vocabulary=1024)
    spent, naive = scoring_flops(parent, variants, batch), naive_flops(parent, variants, batch)
    pairs = naive_pair_flops(parent, variants, batch)
    name = "score/12 layers, hidden 256, 5 other attentions and 8 other FFNs a layer"
    return [
        row(f"{name}: share of one forward pass for each scored variant", spent / naive, "share", TARGET_SHARE),
        row(
            f"{name}: share of one forward pass for each pair of them, as Puzzletron scores them",
            spent / pairs,
            "share",
            TARGET_SHARE,
        ),
    ]


class Recorded:
    """Takes the events of a job."""

    def __init__(self) -> None:
        self.state = StageState("scores")
        self.told: list[tuple[float, float | None]] = []

    def emit(self, event: Mapping[str, Any]) -> None:
        """Note when it came, and the time left that a user would be told then."""
        if not self.told:
            self.state.apply({"type": "start", "time": event["time"]})
        self.state.apply(event)
        early = self.state.done / self.state.total < EARLY
        self.told.append((event["time"], None if early else self.state.seconds_left(event["time"])))


def time_left() -> Row:
    """How wrong the time left is that is told once 5 % of the text is scored."""
    parent = untrained(num_layers=4, hidden=64, heads=4, width=192, vocabulary=128)
    variants = variants_of(parent, kv_heads=(2, 1), widths=(0.75, 0.5, 0.25))
    text = random_text(400, TOKENS, vocabulary=128)
    recorded = Recorded()
    with tempfile.TemporaryDirectory() as folder:
        context = dataclasses.replace(quiet_context(Path(folder)), reporter=recorded)
        score_replacements(parent, variants, [text], ["kl"], context)
    end = recorded.told[-1][0]
    when, left = next((when, left) for when, left in recorded.told if left is not None)
    name = "score/400 rows of text: error of the time left that is told after the first 5 %"
    return row(name, abs(left - (end - when)) / (end - when), "share", TARGET_ERROR)


def growth(plot: Path) -> list[Row]:
    """How CPU seconds for all variants grow with layers, options and tokens, and a plot of it."""
    settings = {
        "layers": [{"num_layers": count} for count in (2, 4, 8, 16)],
        "options a layer": [{"options": count} for count in (4, 8, 16, 32)],
        "tokens a row": [{"tokens": count} for count in (64, 128, 256, 512)],
    }
    rows: list[Row] = []
    growths = []
    for what, sizes in settings.items():
        numbers = [next(iter(size.values())) for size in sizes]
        seconds = [seconds_of(**size) for size in sizes]
        naive = [seconds[0] * (number / numbers[0]) ** (2 if what == "layers" else 1) for number in numbers]
        for number, ours, theirs in zip(numbers, seconds, naive, strict=True):
            rows.append(row(f"score/growth with {what}: {number}, versus as naive grows", ours, "s", theirs))
        growths.append(Growth(what, numbers, seconds, naive))
    plot_growths(plot, growths, "as naive grows")
    return rows


def seconds_of(*, num_layers: int = 4, options: int = 8, tokens: int = TOKENS) -> float:
    """Seconds for all variants of a model of hidden size 64 on four rows: both no-ops and so many FFN widths."""
    parent = untrained(num_layers=num_layers, hidden=64, heads=4, width=192, vocabulary=128)
    variants = variants_of(parent, kv_heads=(), widths=tuple(n / (options - 1) for n in range(1, options - 1)))
    text = random_text(4, tokens, vocabulary=128)
    times = []
    for _ in range(ROUNDS):
        began = time.process_time()
        scored(parent, variants, text)
        times.append(time.process_time() - began)
    return min(times)


def trained_parent(folder: Path) -> TesseraForCausalLM:
    """A Llama of four layers that has learned to add, and its folder."""
    config = llama_config(num_layers=4, hidden=64, heads=4, width=192, vocabulary=len(LETTERS))
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(STEPS):
        batch = sums_text(STEP_ROWS, TOKENS, seed=2 + step)
        logits = model(batch.input_ids_BT).logits
        functional.cross_entropy(logits.flatten(0, 1), batch.labels_BT.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return load_model(folder).requires_grad_(False)


def llama_config(*, num_layers: int, hidden: int, heads: int, width: int, vocabulary: int) -> LlamaConfig:
    """A dense Llama whose heads all have keys and values of their own."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden // heads,
        intermediate_size=width,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )


def sums_text(rows: int, tokens: int, seed: int) -> Batch:
    """Rows of sums, one after another; every position counts."""
    generator = random.Random(seed)

    def line() -> str:
        a, b = generator.randrange(100), generator.randrange(100)
        return f"{a}+{b}={a + b} "

    numbers = {letter: number for number, letter in enumerate(LETTERS)}
    text = ["".join(line() for _ in range(tokens // 4))[: tokens + 1] for _ in range(rows)]
    return packed(torch.tensor([[numbers[letter] for letter in row] for row in text]))


def random_text(rows: int, tokens: int, vocabulary: int) -> Batch:
    """Rows of tokens at random."""
    return packed(torch.randint(vocabulary, (rows, tokens + 1), generator=torch.Generator().manual_seed(0)))


def packed(ids: torch.Tensor) -> Batch:
    """One document a row; the last token of each is only predicted."""
    positions = torch.arange(ids.shape[1] - 1).expand(len(ids), -1)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, torch.ones_like(positions))


def untrained(*, num_layers: int, hidden: int, heads: int, width: int, vocabulary: int) -> TesseraForCausalLM:
    """A parent of which only the shape matters."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(
            llama_config(num_layers=num_layers, hidden=hidden, heads=heads, width=width, vocabulary=vocabulary)
        ).save_pretrained(folder)
        return load_model(Path(folder)).requires_grad_(False)


def variants_of(
    parent: TesseraForCausalLM, *, kv_heads: tuple[int, ...], widths: tuple[float, ...], linear: bool = False
) -> dict[BlockKey, Subblock | None]:
    """Variants of every layer as initialised, no-ops included."""
    variants: dict[BlockKey, Subblock | None] = {}
    for layer, block in enumerate(parent.model.layers):
        width = block.mlp.up_proj.out_features
        narrower = tuple(int(fraction * width) for fraction in widths)
        more: tuple[Size, ...] = (LINEAR,) if linear else ()
        sizes: dict[Part, tuple[Size, ...]] = {"attention": (*kv_heads, *more), "ffn": (*narrower, *more)}
        for part in PARTS:
            own = subblock_weights(block.state_dict(), part)
            for size in sizes[part]:
                variant = Variant(part, size)
                weights = initialise(
                    own, variant, importance_I=torch.arange(float(width)), head_dim=parent.config.head_dim
                )
                variants[layer, variant] = build_subblock(parent, layer, variant, weights)
            variants[layer, Variant(part, 0)] = None
    return variants


def scored(parent: TesseraForCausalLM, variants: Replacements, batch: Batch) -> Scores:
    """Our scores."""
    with tempfile.TemporaryDirectory() as folder:
        return score_replacements(parent, variants, [batch], ["kl"], quiet_context(Path(folder)))


def scoring_flops(parent: TesseraForCausalLM, variants: Replacements, batch: Batch) -> int:
    """Operations of scoring, as torch counts them; its unfused attention is the one that it counts."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scored(parent, variants, batch)
    return int(counter.get_total_flops())


def forward_flops(model: TesseraForCausalLM, batch: Batch) -> int:
    """Operations of one forward pass, head included."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(batch.input_ids_BT, segment_ids=batch.segment_ids_BT)
    return int(counter.get_total_flops())


def naive_flops(parent: TesseraForCausalLM, variants: Replacements, batch: Batch) -> int:
    """Operations of a forward pass of a whole model for each variant."""
    return sum(forward_flops(with_replaced(parent, key, block), batch) for key, block in variants.items())


def naive_pair_flops(parent: TesseraForCausalLM, variants: Replacements, batch: Batch) -> int:
    """Operations of a forward pass for each pair of an attention and an FFN of a layer, but the parent's own."""
    whole = forward_flops(parent, batch)
    changes = {key: forward_flops(with_replaced(parent, key, block), batch) - whole for key, block in variants.items()}
    total = 0
    for layer in range(len(parent.model.layers)):
        attentions, ffns = (
            [0, *(change for (of, variant), change in changes.items() if (of, variant.part) == (layer, part))]
            for part in PARTS
        )
        total += sum(whole + a + f for a in attentions for f in ffns) - whole
    return total


def write_for_puzzletron(folder: Path, variants: Replacements, batch: Batch) -> None:
    """The batch, and a folder of sub-blocks for each kind of variant, as its library expects them."""
    save_file({"input_ids": batch.input_ids_BT, "targets": batch.labels_BT}, folder / "batch.safetensors")
    for (layer, variant), block in variants.items():
        if block is not None:
            blocks = folder / variant.name / "subblocks_safetensors"
            blocks.mkdir(parents=True, exist_ok=True)
            weights = {f"model.layers.{layer}.{name}": tensor for name, tensor in block.weights().items()}
            save_file(weights, blocks / f"block_{layer}_{variant.part}.safetensors")
    listed = [{"layer": layer, "part": variant.part, "size": variant.size} for layer, variant in variants]
    (folder / "variants.json").write_text(json.dumps(listed), encoding="utf-8")


def puzzletron(folder: Path) -> dict[str, list[float]]:
    """Puzzletron's scores and seconds."""
    python = environment("puzzletron-scoring", *PEER)
    site_packages = Path(transformers.__file__).parents[1]
    environ = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [python, Path(__file__).with_name("puzzletron_scoring.py"), folder, site_packages],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env={**environ, "OMP_NUM_THREADS": "1"},
    )
    answer: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return answer


def row(name: str, value: float, unit: str, versus: float) -> Row:
    """One line of the result; the ratio says how many times less ours is, None where it would divide by 0."""
    return {"name": name, "value": value, "unit": unit, "versus": versus, "ratio": versus / value if value else None}


if __name__ == "__main__":
    main()
