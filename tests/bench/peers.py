"""The search against pruning: same parent, as many tokens, same distillation. `python -m tests.bench.peers OUT`.

Four ways to make a child: layers dropped by the KL of the parent without each (depth), by block influence (depth), FFN
neurons and attention groups dropped by their activations (width), and the search. Each is compared at two budgets: at
equal measured latency in vLLM, and at equal parameters. The budgets are those of a model without some of the parent's
layers. Every child sees as many tokens in all: blockwise distillation of the library counts for the search, and the
others are distilled for as many steps more. Only the order of the text differs between the seeds.

The parent is a small one that learns the demo's arithmetic, or with `--real FOLDER` the model that
`python -m tests.bench.real_model FOLDER` writes.
"""

import argparse
import hashlib
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig

from components.core.model.architecture import Architecture
from components.core.model.checkpoint import load_model, model_config, written_config
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.inspection import stored_dtype
from components.core.runtime.context import StageContext, quiet_context
from components.core.runtime.placement import Placement
from components.core.serving.load_profile import LoadProfile
from components.core.serving.timing import measure_times
from components.core.text.packing import Batch, corpus_stream, load_batches
from components.core.text.tokenizer import plain_prompt_ids
from components.core.training.greedy_decoding import complete
from components.core.training.loop import train
from components.core.training.losses import distillation_loss, next_token_loss, paired_layers
from components.core.training.train_config import TrainConfig
from components.data.arithmetic import sample
from components.data.config import ArithmeticConfig, DataConfig
from components.pretrain.config import Shape
from components.search.child.child_model import trainable
from components.search.child.evaluation import held_out_kl
from components.search.config import Distillation, LatencyFeedback, Limits, Measurement, SearchConfig, TaskSet
from components.search.scoring.task_accuracy import Tasks, load_tasks
from components.search.search_table import SearchTable
from components.search.stages.search_step import search
from tests.bench.pruning import (
    Importance,
    activation_importance,
    block_influences,
    layer_kls,
    least,
    narrow_config,
    prune_width,
    without_layers,
)
from tests.bench.rows import Row, tell, write_rows
from tests.bench.toy_parent import train_toy_parent

LATENCY, PARAMETERS = "equal latency", "equal parameters"
KL, INFLUENCE, WIDTH, OURS = "depth, KL", "depth, block influence", "width, activations", "search"
MEMORY_GIB = 16.0
LADDER = (1.0, 0.75, 0.5, 0.25, 0.125)
"""FFN widths that are timed for the width peer, as fractions of the parent's; times between them are interpolated."""
WIDTH_STEP = 16
"""FFN widths are multiples of it."""
TRIAL = 4
"""The width peer chooses between shapes after this fraction of the distillation."""


@dataclass(frozen=True)
class Sizes:
    """How much is done.

    Attributes:
        seq_len: tokens of a row.
        batch: rows a step.
        bld_steps: steps of the search's library.
        distil_steps: steps of the distillation that follows; the peers take the other steps too.
        learning_rate: of the distillation.
        calibration: batches of held-out text that all methods choose by.
        held_out: batches of text that are judged on.
        dropped: fractions of the parent's layers whose loss sets the budgets.
        load: what is timed.
        task: problems that are solved.
    """

    seq_len: int
    batch: int
    bld_steps: int
    distil_steps: int
    learning_rate: float
    calibration: int
    held_out: int
    dropped: tuple[float, ...]
    load: LoadProfile
    task: TaskSet


TOY = Sizes(
    seq_len=128,
    batch=8,
    bld_steps=40,
    distil_steps=60,
    learning_rate=2e-3,
    calibration=4,
    held_out=16,
    dropped=(0.25, 0.5),
    load=LoadProfile(batch_size=64, prompt_tokens=16, new_tokens=16, rounds=7),
    task=TaskSet(num_problems=200, max_tokens=40),
)
TOY_SHAPE = Shape(
    hidden_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=512,
    initializer_range=0.06,
)
TOY_PARENT_STEPS, NUM_PROBLEMS = 500, 16_000
REAL = Sizes(
    seq_len=256,
    batch=4,
    bld_steps=20,
    distil_steps=100,
    learning_rate=3e-4,
    calibration=2,
    held_out=16,
    dropped=(1 / 3,),
    load=LoadProfile(batch_size=8, prompt_tokens=32, new_tokens=16, rounds=5),
    task=TaskSet(num_problems=40, max_tokens=96),
)


@dataclass(frozen=True)
class World:
    """What all methods share.

    Attributes:
        folder: for what they write.
        parent_folder: the parent, with its tokenizer.
        parent: the same in float32, frozen.
        corpus: text to train on and to choose by.
        documents: held-out text of the corpus.
        other: text of another kind.
        tasks: problems.
        sizes: how much is done.
        threads: of the processor.
    """

    folder: Path
    parent_folder: Path
    parent: TesseraForCausalLM
    corpus: Path
    documents: Sequence[Batch]
    other: Sequence[Batch]
    tasks: Tasks
    sizes: Sizes
    threads: int

    @property
    def depth(self) -> int:
        """Layers of the parent."""
        return len(self.parent.model.layers)

    def calibration(self) -> list[Batch]:
        """Held-out text that methods choose by."""
        sizes = self.sizes
        return load_batches(
            self.corpus,
            self.parent_folder,
            "validation",
            seq_len=sizes.seq_len,
            batch_size=sizes.batch,
            limit=sizes.calibration,
        )

    def context(self, folder: Path) -> StageContext:
        """A place to work in."""
        quiet = quiet_context(folder)
        return StageContext(
            quiet.reporter, quiet.resume, quiet.scratch, Placement(threads=self.threads, memory_gib=MEMORY_GIB)
        )


@dataclass(frozen=True)
class Child:
    """A child before its distillation.

    Attributes:
        method: how it was made.
        config: its shape.
        make: makes it, in float32, to be trained.
        steps: of its distillation.
    """

    method: str
    config: PretrainedConfig
    make: Callable[[], TesseraForCausalLM]
    steps: int


def toy_world(folder: Path, threads: int) -> World:
    """Text of the demo's arithmetic, and a parent that learns it; the other text are longer problems."""
    data = DataConfig(arithmetic=ArithmeticConfig(num_train=NUM_PROBLEMS, num_chats=10, num_test=10), seed=0)
    trained = train_toy_parent(
        folder, data, TOY_SHAPE, TOY_PARENT_STEPS, seq_len=TOY.seq_len, batch_size=TOY.batch, threads=threads
    )
    longer = sample("test", 400, (6, 10), random.Random(0))
    rows = [{"prompt": problem.question, "completion": f"{problem.trace}:{problem.answer}"} for problem in longer]
    write_split(folder / "other", rows)
    world = world_of(folder, trained, folder / "data" / "corpus", folder / "data" / "problems", TOY, threads)
    prompts = plain_prompt_ids(world.parent_folder, [problem.prompt for problem in world.tasks.problems])
    return replace(world, tasks=replace(world.tasks, prompts=prompts))  # it has never seen a chat


def real_world(source: Path, folder: Path, threads: int) -> World:
    """The model and the text of a folder of `real_model.py`; the other text are its chats."""
    corpus: dict[str, list[Mapping[str, Any]]] = {"train": [], "validation": []}
    for row in read(source / "data" / "corpus.jsonl"):
        held_out = hashlib.sha256(row["text"].encode()).digest()[0] < 13  # one in twenty
        corpus["validation" if held_out else "train"].append(row)
    for split, rows in corpus.items():
        write_split(folder / "corpus", rows, split)
    chats = [
        {turn["role"]: turn["content"] for turn in row["messages"]} for row in read(source / "data" / "chats.jsonl")
    ]
    write_split(
        folder / "other",
        [{"prompt": f"{chat['user']}\n", "completion": chat["assistant"]} for chat in chats if "<think>" not in chat],
    )
    problems = [{**row, "prompt": f"{row['question']}\nAnswer:"} for row in read(source / "data" / "problems.jsonl")]
    write_split(folder / "problems", problems)
    return world_of(folder, source / "model", folder / "corpus", folder / "problems", REAL, threads)


def world_of(folder: Path, parent_folder: Path, corpus: Path, problems: Path, sizes: Sizes, threads: int) -> World:
    """Read what is judged on."""
    parent = load_model(parent_folder).requires_grad_(False)

    def held_out(text: Path, seed: int) -> list[Batch]:
        return load_batches(
            text,
            parent_folder,
            "validation",
            seq_len=sizes.seq_len,
            batch_size=sizes.batch,
            limit=sizes.held_out,
            seed=seed,
        )

    tasks = load_tasks(sizes.task, problems, parent_folder)
    return World(
        folder, parent_folder, parent, corpus, held_out(corpus, 1), held_out(folder / "other", 1), tasks, sizes, threads
    )


def read(file: Path) -> Iterator[dict[str, Any]]:
    """Rows of JSON Lines."""
    return map(json.loads, file.read_text(encoding="utf-8").splitlines())


def write_split(folder: Path, rows: Sequence[Mapping[str, Any]], split: str = "validation") -> None:
    """Write rows as a split of a corpus."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def compare(world: World, seeds: Sequence[int]) -> list[Row]:
    """All methods at all budgets: rows, and a table on standard error."""
    batches = world.calibration()
    scores = {KL: layer_kls(world.parent, batches), INFLUENCE: block_influences(world.parent, batches)}
    importance = activation_importance(world.parent, batches)
    times = ladder(world)
    rows = judged_rows("the parent", [judged(world, world.parent)])
    for fraction in world.sizes.dropped:
        count = round(fraction * world.depth)
        children = depth_children(world, scores, count)
        level = f"{count} of {world.depth} layers"
        budgets = {LATENCY: times.depth[count], PARAMETERS: parameters_of(children[0].config)}
        for budget, limit in budgets.items():
            here = [
                *children,
                width_child(world, importance, times, budget, limit),
                searched_child(world, budget, limit, f"{budget} {count}"),
            ]
            rows += compared(world, f"{level}, {budget}", [child for child in here if child is not None], seeds)
    return rows


def depth_children(world: World, scores: Mapping[str, Sequence[float]], count: int) -> list[Child]:
    """The parent without its least important layers, by each of the scores."""
    found = []
    for method, values in scores.items():
        dropped = least(values, count)
        tell(f"{method}: drops layers {sorted(dropped)}")

        def make(dropped: set[int] = dropped) -> TesseraForCausalLM:
            return trainable(without_layers(world.parent, dropped))

        config = without_layers(world.parent, dropped).config
        found.append(Child(method, config, make, world.sizes.distil_steps + world.sizes.bld_steps))
    return found


@dataclass(frozen=True)
class Times:
    """Decode steps in vLLM as shares of the parent's.

    Attributes:
        depth: by the number of dropped layers.
        width: by the number of groups: FFN widths, rising, and the share of each.
    """

    depth: dict[int, float]
    width: dict[int, tuple[list[int], list[float]]]


def ladder(world: World) -> Times:
    """Time the shapes that depth and width pruning can have, in turns with the parent; weights are random."""
    config = world.parent.config
    counts = [round(fraction * world.depth) for fraction in world.sizes.dropped]
    depth = {count: without_layers(world.parent, set(range(1, count + 1))).config for count in counts}
    full = Architecture.from_config(config.to_dict()).blocks[0]
    heads, channels = full.num_key_value_heads, full.intermediate_size
    assert isinstance(heads, int)
    assert isinstance(channels, int)
    queries = config.num_attention_heads // heads
    groups = [count for count in range(heads, 0, -1) if config.hidden_size % (queries * count) == 0]
    widths = sorted(round(fraction * channels) for fraction in LADDER)
    narrow = {(count, width): narrow_config(config, count, width) for count in groups for width in widths}
    shares = shares_of_parent(world, [*depth.values(), *narrow.values()])
    of_depth, of_width = shares[: len(depth)], dict(zip(narrow, shares[len(depth) :], strict=True))
    return Times(
        dict(zip(depth, of_depth, strict=True)),
        {count: (widths, np.maximum.accumulate([of_width[count, w] for w in widths]).tolist()) for count in groups},
    )


def shares_of_parent(world: World, configs: Sequence[PretrainedConfig]) -> list[float]:
    """Median decode step of models of these shapes, each as a share of the parent's right before it."""
    with tempfile.TemporaryDirectory(dir=world.folder) as scratch:
        folders = [Path(scratch) / str(number) for number in range(1 + len(configs))]
        for folder, config in zip(folders, [world.parent.config, *configs], strict=True):
            folder.mkdir()
            with torch.device("meta"):
                model = TesseraForCausalLM(model_config(config.to_dict()))
            (folder / "config.json").write_text(json.dumps(written_config(model)), encoding="utf-8")
        load = world.sizes.load.served_as(stored_dtype(world.parent_folder))
        times = measure_times(folders, load, 1, MEMORY_GIB, random_weights=True)
    medians = [statistics.median(time.step_ms for time in model) for model in times]
    return [median / medians[0] for median in medians[1:]]


def parameters_of(config: PretrainedConfig) -> int:
    """Parameters of a model of this shape."""
    return Architecture.from_config(config.to_dict()).parameters


def width_child(world: World, importance: Importance, times: Times, budget: str, limit: float) -> Child | None:
    """The width-pruned model within a limit: for each number of groups the widest FFN, of those the best after a while.

    None where even the smallest takes more.
    """
    steps = world.sizes.distil_steps + world.sizes.bld_steps
    children = []
    for groups, (widths, shares) in times.width.items():

        def fits(width: int, groups: int = groups, widths: Any = widths, shares: Any = shares) -> bool:
            if budget == LATENCY:
                return float(np.interp(width, widths, shares)) <= limit
            return parameters_of(narrow_config(world.parent.config, groups, width)) <= limit

        fitting = [width for width in range(WIDTH_STEP, widths[-1] + 1, WIDTH_STEP) if fits(width)]
        if fitting:

            def make(groups: int = groups, width: int = fitting[-1]) -> TesseraForCausalLM:
                return trainable(prune_width(world.parent, importance, groups, width))

            config = narrow_config(world.parent.config, groups, fitting[-1])
            children.append((f"{groups} groups, {fitting[-1]} neurons", Child(WIDTH, config, make, steps)))
    if not children:
        tell(f"{WIDTH}: none is within the limit {limit:.4g} at {budget}")
        return None
    kls = [trial_kl(world, child) for _, child in children] if len(children) > 1 else [0.0]
    tell(f"{WIDTH}, {budget}: " + "; ".join(f"{name} {kl:.4f}" for (name, _), kl in zip(children, kls, strict=True)))
    return children[kls.index(min(kls))][1]


def trial_kl(world: World, child: Child) -> float:
    """KL from the parent after a short distillation."""
    model = child.make()
    distil(world, model, child.steps // TRIAL, seed=0)
    return held_out_kl(world.parent, [model], world.calibration())[0].kl


def searched_child(world: World, budget: str, limit: float, name: str) -> Child:
    """The search's child within a limit; importance, library, scores and costs of its first call serve the others."""
    sizes = world.sizes
    limits = Limits(latency_ms=f"{100 * limit:.4f}%") if budget == LATENCY else Limits(parameters=int(limit))
    config = SearchConfig(
        ffn_fractions=(1.0, 0.75, 0.5, 0.25),
        seq_len=sizes.seq_len,
        batch_size=sizes.batch,
        importance_batches=sizes.calibration,
        scoring_batches=sizes.calibration,
        distillation=Distillation(num_steps=sizes.bld_steps),
        measurement=Measurement(**sizes.load.model_dump()),
        limits=limits,
        latency_feedback=LatencyFeedback(max_rounds=3 if budget == LATENCY else 0),
        pareto_points=2,
        seed=0,
    )
    out = world.folder / name.replace(" ", "-")
    made = world.folder / "search-upstream"
    began = time.monotonic()
    context = world.context(made.parent / "search-job")
    inputs: dict[str, Any] = {"parent": world.parent_folder, "corpus": world.corpus}
    if made.exists():
        inputs |= {part: made / part for part in ("importance", "costs")}
        inputs |= {"libraries": [made / "library"], "scores": [made / "scores"]}
    search(config, context=context, out=out, **inputs)
    if not made.exists():
        (context.scratch / "search").rename(made)
    table = SearchTable.model_validate_json((out / "search_table" / "search.json").read_bytes())
    tell(f"{OURS}, {name}: {time.monotonic() - began:.0f} s, {describe(table)}")
    child = load_model(out / "child")
    return Child(OURS, child.config, lambda: load_model(out / "child"), sizes.distil_steps)


def describe(table: SearchTable) -> str:
    """Attention and FFN of each layer of the search's child, as written."""
    layers = [f"{layer.num_key_value_heads}/{layer.intermediate_size}" for layer in table.child.fused_layers]
    rounds = [
        f"{entry.predicted['latency_ms']:.3g}>{entry.measured['latency_ms']:.3g}" for entry in table.latency_feedback
    ]
    return f"{' '.join(layers)}; ms predicted>measured: {' '.join(rounds) or 'not measured'}"


def distil(world: World, child: TesseraForCausalLM, num_steps: int, seed: int) -> None:
    """The distillation that every child gets."""
    sizes = world.sizes
    stream = corpus_stream(world.corpus, world.parent_folder, "train", seq_len=sizes.seq_len, seed=seed)
    config = TrainConfig(
        num_steps=num_steps,
        global_batch_size=sizes.batch,
        micro_batch_size=sizes.batch,
        seq_len=sizes.seq_len,
        learning_rate=sizes.learning_rate,
        compile=False,
        resume_interval_s=1e6,
        seed=seed,
    )
    loss = distillation_loss(world.parent, paired_layers(world.parent, child))
    with tempfile.TemporaryDirectory(dir=world.folder) as folder:
        train(child, stream, loss, config, world.context(Path(folder)))
    child.train(False)


@dataclass(frozen=True)
class Judged:
    """How good a model is.

    Attributes:
        documents: perplexity on held-out text.
        other: perplexity on other text.
        accuracy: fraction of the problems that are solved.
    """

    documents: float
    other: float
    accuracy: float


@torch.no_grad()
def judged(world: World, model: TesseraForCausalLM) -> Judged:
    """Perplexities and accuracy of a model."""

    def perplexity(batches: Sequence[Batch]) -> float:
        loss = sum(float(next_token_loss(model, batch)["loss"]) for batch in batches)
        return math.exp(loss / sum(batch.num_targets for batch in batches))

    tasks = world.tasks
    completions = complete(model, tasks.prompts, [tasks.max_tokens] * len(tasks.prompts), tasks.eos)
    right = [bool(solved) for solved in tasks.graded(completions)]
    return Judged(perplexity(world.documents), perplexity(world.other), statistics.fmean(right))


def compared(world: World, where: str, children: Sequence[Child], seeds: Sequence[int]) -> list[Row]:
    """Distil the children of one budget with each seed, and time their shapes."""
    shares = shares_of_parent(world, [child.config for child in children])
    rows: list[Row] = []
    means: dict[str, Judged] = {}
    for child, share in zip(children, shares, strict=True):
        found = []
        for seed in seeds:
            model = child.make()
            distil(world, model, child.steps, seed)
            found.append(judged(world, model))
            tell(f"{where}: {child.method}, seed {seed}: {found[-1]}")
        name = f"{where}: {child.method}"
        parameters = parameters_of(child.config) / parameters_of(world.parent.config)
        rows.append(Row(f"{name}: decode step", share, "of the parent's"))
        rows.append(Row(f"{name}: parameters", parameters, "of the parent's"))
        rows += judged_rows(name, found)
        means[child.method] = Judged(
            *(statistics.fmean(getattr(each, field) for each in found) for field in ("documents", "other", "accuracy"))
        )
    ours = means.pop(OURS)
    for field in ("documents", "other"):
        method = min(means, key=lambda name: float(getattr(means[name], field)))
        best, value = float(getattr(means[method], field)), float(getattr(ours, field))
        rows.append(Row(f"{where}: perplexity, {field}, against the best peer", value, "", method, best / value))
    return rows


def judged_rows(name: str, found: Sequence[Judged]) -> list[Row]:
    """Means over the seeds, with the standard deviation."""

    def row(what: str, values: Sequence[float]) -> Row:
        spread = f"standard deviation {statistics.stdev(values):.3g} of {len(values)} seeds" if len(values) > 1 else ""
        return Row(f"{name}: {what}", statistics.fmean(values), "", spread)

    return [
        row("perplexity, documents", [each.documents for each in found]),
        row("perplexity, other text", [each.other for each in found]),
        row("accuracy", [each.accuracy for each in found]),
    ]


def main() -> None:
    """Compare, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--real", type=Path, metavar="FOLDER", help="what `tests.bench.real_model` has written")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        world = (
            toy_world(folder, options.threads)
            if options.real is None
            else real_world(options.real, folder, options.threads)
        )
        write_rows(compare(world, range(options.seeds)), options.out)


if __name__ == "__main__":
    main()
