"""What each part of the search is worth after distillation, on one small trained parent: `make bench-search OUT=FILE`.

A parent learns the demo's world of arithmetic. Then, for each of three seeds, its block library is trained (BLD), the
sub-blocks are scored, and children within one budget are distilled alike: chosen by the solver, greedily, uniformly, at
random, with a library that was not trained, without FFN Fusion, and in two steps with half of the distillation each.
What counts is KL(parent || child) on held-out text. The costs are made up, so that no measurement decides: an attention
takes 4 ms and half a millisecond a KV head, an FFN a millisecond and another for 64 channels.

Rows: `value` is the KL of the whole search, `versus` that of what it is compared with, `ratio` versus / value.
"""

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.core.model.checkpoint import load_model, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import quiet_context
from components.core.text.corpus.encoding import load_corpus
from components.core.text.packing import Batch, PackedStream, load_batches
from components.core.training.loop import train
from components.core.training.losses import distillation_loss, paired_layers
from components.core.training.train_config import TrainConfig
from components.data.config import ArithmeticConfig, DataConfig
from components.pretrain.config import Shape
from components.search.child.child_model import child_layers, make_child, trainable
from components.search.child.evaluation import HeldOut, held_out_kl
from components.search.config import Distillation, Fusion, Limits, Measurement, SearchConfig
from components.search.costs.measured import counted_costs
from components.search.costs.resources import CostTable, Machine
from components.search.search_table import SearchTable
from components.search.space.layer_space import Variant, layer_spaces
from components.search.space.subblocks import shape_of
from components.search.stages.search_step import search
from tests.bench.rows import tell
from tests.bench.toy_parent import train_toy_parent

SEEDS = range(3)
LAYERS, HIDDEN, HEADS, WIDTH = 8, 64, 4, 128
SEQ_LEN, BATCH = 128, 8
PARENT_STEPS, BLD_STEPS, DISTIL_STEPS = 400, 40, 40
BUDGET, FIRST_BUDGET = "40%", "65%"
WHOLE = "the whole search"
FUSED = Fusion(keep_last=False)

Row = dict[str, Any]


@dataclass(frozen=True)
class World:
    """What all seeds share: the parent, the text, and held-out rows that decide."""

    folder: Path
    parent: TesseraForCausalLM
    held_out: Sequence[Batch]

    @property
    def corpus(self) -> Path:
        """Training and validation text."""
        return self.folder / "data" / "corpus"

    @property
    def parent_folder(self) -> Path:
        """The trained parent."""
        return self.folder / "parent" / "trained"


def measure() -> list[Row]:
    """All rows."""
    with tempfile.TemporaryDirectory() as folder:
        world = make_world(Path(folder))
        found = [dict(kls_of(world, seed)) for seed in SEEDS]
    return list(rows_of(found))


def make_world(folder: Path) -> World:
    """Make the text, and train the parent."""
    data = DataConfig(arithmetic=ArithmeticConfig(num_train=12_000, num_chats=10, num_test=10), seed=0)
    shape = Shape(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        intermediate_size=WIDTH,
        initializer_range=0.06,
    )
    trained = train_toy_parent(folder, data, shape, PARENT_STEPS, seq_len=SEQ_LEN, batch_size=BATCH)
    corpus = folder / "data" / "corpus"
    parent = load_model(trained).requires_grad_(False)
    held_out = load_batches(corpus, trained, "validation", seq_len=SEQ_LEN, batch_size=BATCH, limit=8, seed=1)
    return World(folder, parent, held_out)


def kls_of(world: World, seed: int) -> Iterator[tuple[str, HeldOut]]:
    """Held-out KL of every child of one seed, after the same distillation."""
    trained = searched(world, seed, "trained", world.parent_folder, Distillation(num_steps=BLD_STEPS), BUDGET)
    plain = searched(world, seed, "plain", world.parent_folder, Distillation(num_steps=0), BUDGET)
    table = trained.table
    choices = {
        WHOLE: (trained, table.child.choice, FUSED),
        "without BLD": (plain, plain.table.child.choice, FUSED),
        "without fusion": (trained, table.child.choice, Fusion(enabled=False)),
        "greedy choice": (trained, table.greedy_child.choice, FUSED),
        "random choice": (trained, table.random_child.choice, FUSED),
        **{f"{name} choice": (trained, other.choice, FUSED) for name, other in table.baselines.items()},
    }
    for name, (found, choice, fusion) in choices.items():
        child = found.child(world.parent, choice, fusion)
        distil(world, world.parent, child, seed, DISTIL_STEPS)
        yield name, judged(world, seed, name, child)
    yield "in two steps", two_steps(world, seed, table.limits)


def two_steps(world: World, seed: int, limits: Mapping[str, float]) -> HeldOut:
    """Search at half of the way, distil, search again from the child at the final budget, distil again."""
    first = searched(world, seed, "first", world.parent_folder, Distillation(num_steps=BLD_STEPS), FIRST_BUDGET)
    middle = first.child(world.parent, first.table.child.choice, Fusion(enabled=False))
    distil(world, world.parent, middle, seed, DISTIL_STEPS // 2)
    folder = world.folder / f"middle-{seed}"
    save_model(middle, folder, tokenizer=world.parent_folder)
    second = searched(world, seed, "second", folder, Distillation(num_steps=BLD_STEPS), limits["latency_ms"])
    child = second.child(load_model(folder).requires_grad_(False), second.table.child.choice, FUSED)
    # The first parent teaches: depths are told in its layers, not in those of the model between.
    child.config.parent_layers = [middle.config.parent_layers[depth - 1] for depth in child.config.parent_layers]
    distil(world, world.parent, child, seed, DISTIL_STEPS // 2)
    return judged(world, seed, "in two steps", child)


@dataclass(frozen=True)
class Searched:
    """A finished search with its library."""

    table: SearchTable
    library: Path
    config: SearchConfig

    def child(self, parent: TesseraForCausalLM, choice: tuple[int, ...], fusion: Fusion) -> TesseraForCausalLM:
        """A child of one choice, to be trained."""
        spaces = layer_spaces(self.config, shape_of(parent.config))
        layers = child_layers(parent, spaces, [self.library], self.table.variants(choice))
        return trainable(make_child(parent, layers, fusion, ()).model)


def searched(
    world: World, seed: int, name: str, parent: Path, distillation: Distillation, budget: str | float
) -> Searched:
    """Search a parent."""
    config = SearchConfig(
        ffn_fractions=(1.0, 0.5, 0.25),
        no_op_ffn=False,
        seq_len=SEQ_LEN,
        batch_size=BATCH,
        importance_batches=2,
        scoring_batches=2,
        distillation=distillation,
        limits=Limits(latency_ms=budget),
        pareto_points=2,
        seed=seed,
    )
    began = time.process_time()
    out = world.folder / f"{name}-{seed}"
    costs = out / "given-costs"
    costs.mkdir(parents=True)
    (costs / "costs.json").write_text(made_up_costs(load_model(parent), config).model_dump_json(), encoding="utf-8")
    context = quiet_context(out)
    search(config, context=context, out=out, parent=parent, corpus=world.corpus, costs=costs)
    table = SearchTable.model_validate_json((out / "search_table" / "search.json").read_bytes())
    tell(f"seed {seed}, {name}: searched in {time.process_time() - began:.1f} CPU seconds")
    return Searched(table, context.scratch / "search" / "library", config)


def made_up_costs(parent: TesseraForCausalLM, config: SearchConfig) -> CostTable:
    """Counted parameters and KV cache, and times that are made up."""
    fixed, variants = counted_costs(parent, layer_spaces(config, shape_of(parent.config)))

    def latency_ms(variant: Variant) -> float:
        if variant.is_no_op:
            return 0.0
        return 4 + variant.count / 2 if variant.part == "attention" else 1 + variant.count / 64

    return CostTable(
        fixed=fixed.model_copy(update={"latency_ms": 1.0}),
        blocks={
            variant.name: costs.model_copy(update={"latency_ms": latency_ms(variant)})
            for variant, costs in variants.items()
        },
        machine=Machine(device="made up", threads=1, versions={}),
        measurement=Measurement(),
        models=(),
    )


def distil(world: World, parent: TesseraForCausalLM, child: TesseraForCausalLM, seed: int, num_steps: int) -> None:
    """The distillation that every child gets."""
    stream = PackedStream(load_corpus(world.corpus, world.parent_folder, "train"), SEQ_LEN, seed)
    config = TrainConfig(
        num_steps=num_steps,
        global_batch_size=BATCH,
        micro_batch_size=BATCH,
        seq_len=SEQ_LEN,
        learning_rate=2e-3,
        seed=seed,
    )
    loss = distillation_loss(parent, paired_layers(parent, child))
    with tempfile.TemporaryDirectory() as folder:
        train(child, stream, loss, config, quiet_context(Path(folder)))


def judged(world: World, seed: int, name: str, child: TesseraForCausalLM) -> HeldOut:
    """KL on the held-out rows."""
    (found,) = held_out_kl(world.parent, [child], world.held_out)
    tell(f"seed {seed}, {name}: KL {found.kl:.4f}, {child.num_parameters():,} parameters, {time.process_time():.0f} s")
    return found


def rows_of(found: Sequence[Mapping[str, HeldOut]]) -> Iterator[Row]:
    """Every comparison of every seed, then the means over seeds."""
    for name in dict.fromkeys(name for kls in found for name in kls if name != WHOLE):
        pairs = [(kls[WHOLE], kls[name]) for kls in found if name in kls]
        for seed, (ours, other) in zip(SEEDS, pairs, strict=False):
            yield row(f"quality/seed {seed}: KL, versus {name}", ours.kl, other.kl)
            difference, error = other.minus(ours)
            yield row(f"quality/seed {seed}: {name}, KL above ours, versus its standard error", difference, error)
        means = [statistics.fmean(kl.kl for kl in side) for side in zip(*pairs, strict=True)]
        yield row(f"quality/mean of {len(pairs)} seeds: KL, versus {name}", *means)


def row(name: str, value: float, versus: float) -> Row:
    """One line of the result."""
    return {"name": name, "value": value, "unit": "nats", "versus": versus, "ratio": versus / value if value else None}


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")
