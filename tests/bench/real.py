"""A real model through the whole pipeline with a recipe of `tessera init`: `python -m tests.bench.real OUT [--quick]`.

It makes the model and its data (`real_model.py`), lets `tessera init` write the recipe, runs it whole, and measures
what the run did not: the perplexity of the child on text of two kinds and lengths, and our training and GRPO steps
beside those of others. `--quick` is the same with a tiny model and little data.

Everything is kept in a folder of the user's cache, where a second start goes on: what is made is not made again.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from components.core.runtime.context import quiet_context
from components.core.store.store import Store, open_store
from components.eval.config import HeldOutText
from components.eval.held_out import held_out_loss, perplexity
from pipelines.recipe.schema import load_recipe
from pipelines.records.runs import artifact, stage_documents
from pipelines.report.summary import build_summary
from tests.bench.environment import CACHE, run_beside
from tests.bench.grpo import TRL, write_float32
from tests.bench.memory import run_measured
from tests.bench.real_model import write_inputs, write_small
from tests.bench.rows import Row, tell, write_rows
from tests.bench.training import ACCELERATE, SIZES

RUN = "real"
LIMITS = {"latency_ms": "70%", "parameters": "67%"}
"""Budget of the child: what a user asks for, as shares of the parent's own cost."""
TEXT_TOKENS, TEXT_BATCH = 16_384, 8
"""Tokens that a perplexity is measured on at most, and rows at a time."""


class Text(NamedTuple):
    """Held-out text that a perplexity is measured on.

    Attributes:
        name: of the row.
        is_corpus: whether it is the validation text of the run's corpus, else another story.
        seq_len: tokens of a row.
    """

    name: str
    is_corpus: bool
    seq_len: int


TEXTS = (
    Text("perplexity_docs_128", True, 128),
    Text("perplexity_docs_512", True, 512),
    Text("perplexity_other_512", False, 512),
)


def run_whole(folder: Path, *, quick: bool) -> None:
    """Make model and data, let `tessera init` write a recipe, and run it; what is done already is not done again.

    Args:
        folder: takes everything.
        quick: a tiny model and little data.

    Raises:
        SystemExit: something cannot be made, or a command of ours failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tell("model, text, chats and problems")
    (write_small if quick else write_inputs)(folder)
    recipe, data = folder / "recipe.yaml", folder / "data"
    if not recipe.is_file():
        tell("the recipe")
        sources = [f"--{name}={data / name}.jsonl" for name in ("corpus", "chats", "problems")]
        limits = [f"--limits={name}={value}" for name, value in LIMITS.items()]
        tessera(folder, "init", str(folder / "model"), *sources, *limits, "--out", str(recipe))
    tell("the run")
    tessera(folder, "run", str(recipe), "--run", RUN, "--store", str(folder / "store"))


def tessera(folder: Path, *arguments: str) -> None:
    """Run the command as a user does, and keep the peak of memory of all commands in `memory.json`, bytes.

    Raises:
        SystemExit: it failed.
    """
    status, peak = run_measured([sys.executable, "-m", "pipelines", *arguments])
    file = folder / "memory.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else 0
    file.write_text(json.dumps(max(peak, before)), encoding="utf-8")
    if status:
        sys.exit(f"tessera {arguments[0]} ended with {status}; the same command goes on from here, in {folder}")


def rows_of_run(folder: Path) -> Iterator[Row]:
    """What the run itself has measured."""
    store = open_store(folder / "store")
    summary = build_summary(store, RUN)
    models = summary["models"]
    yield Row("minutes", minutes(store, summary["seconds"]), "min")
    peak = json.loads((folder / "memory.json").read_text(encoding="utf-8"))
    yield Row("memory", peak / 2**30, "GiB", "all processes together")
    tuned, last = models["sft"], models["rl"]
    for mode in ("on", "off"):
        yield fraction(f"format_{mode}", last["format"][mode], f"fine-tuned {tuned['format'][mode]:.3f}")
    gain = last["gains"]["over"]["sft"]["standard"]["on"]
    before = tuned["accuracy"]["standard"]["on"]
    known = (
        f"fine-tuned {before:.3f}; 95 % interval {gain['low']:.3f} to {gain['high']:.3f}, {gain['problems']} problems"
    )
    yield fraction("rl_gain", gain["value"], known, gain["ratio"])
    sizes = [models[role]["disk_bytes"] for role in ("distilled", "parent")]
    parameters = [models[role]["parameters"] for role in ("distilled", "parent")]
    share = parameters[0] / parameters[1]
    yield fraction("disk_ratio", sizes[0] / sizes[1], f"parent {sizes[1] / 2**20:.1f} MiB; parameters {share:.3f}")


def minutes(store: Store, seconds: float) -> float:
    """Minutes of the whole run.

    Where it was interrupted, or a stage's result was there already, those are counted that the stages took when they
    were computed.

    Args:
        store: has the run.
        seconds: between begin and end of the last attempt.
    """
    records = [store.stage_record(document["key"]) for document in stage_documents(store, RUN).values()]
    return max(seconds, sum(record.seconds for record in records if record is not None)) / 60


def fraction(name: str, value: float, versus: str, ratio: float | None = None) -> Row:
    """A row of a fraction of one."""
    return Row(name, value, "fraction", versus, ratio)


def perplexities(folder: Path) -> Iterator[Row]:
    """Perplexity of the distilled child and of its parent."""
    store = open_store(folder / "store")
    models = {"distilled": store.fetch(artifact(store, RUN, "distilled")), "parent": folder / "model"}
    corpus, context = store.fetch(artifact(store, RUN, "corpus")), quiet_context(folder / "held-out")
    for text in TEXTS:
        config = HeldOutText(
            seq_len=text.seq_len, batch_size=TEXT_BATCH, num_batches=TEXT_TOKENS // TEXT_BATCH // text.seq_len
        )
        source = corpus if text.is_corpus else folder / "story"
        child, parent = (
            perplexity(held_out_loss(role, model, source, config, context)) for role, model in models.items()
        )
        tell(f"{text.name}: {child:.1f}, parent {parent:.1f}")
        yield Row(text.name, child, "perplexity", f"parent {parent:.1f}", parent / child)


def beside_others(folder: Path, *, quick: bool) -> Iterator[Row]:
    """Our training and GRPO steps beside those of `transformers.Trainer` and TRL, on the parent; measured once."""
    training, grpo = folder / "training.json", folder / "grpo.json"
    if not training.is_file():
        tell("training beside transformers.Trainer")
        module = "tests.bench.real_training" if quick else "tests.bench.training"
        run_beside("training", (ACCELERATE,), module, str(training))
    size = SIZES[0 if quick else -1].name
    found = next(row for row in read_rows(training) if row["name"] == f"training, {size}")
    yield renamed("training_ratio", found)
    if not grpo.is_file():
        tell("a GRPO step beside TRL")
        model = folder / "model"
        if load_recipe(folder / "recipe.yaml").serving.dtype == "float32":  # the processor is slow in the model's own
            model = folder / "model-float32"
            write_float32(folder / "model", model)
        run_beside("trl", TRL, "tests.bench.grpo", str(grpo), str(model), str(folder / "data" / "problems.jsonl"))
    yield renamed("grpo_ratio", read_rows(grpo)[0])


def renamed(name: str, row: Mapping[str, Any]) -> Row:
    """The ratio of a row as a number of its own."""
    return fraction(
        name, row["ratio"], f"{row['name']}: {row['value']:.4g} {row['unit']}; {row['versus']}", row["ratio"]
    )


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows that another benchmark has written."""
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    return rows


def main() -> None:
    """Run, measure, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.real")
    parser.add_argument("out", type=Path)
    parser.add_argument("--quick", action="store_true", help="a tiny model and little data")
    options = parser.parse_args()
    folder = CACHE.parent / ("real-quick" if options.quick else "real")
    tell(f"everything is kept in {folder}; remove it to begin anew")
    run_whole(folder, quick=options.quick)
    measured = [*rows_of_run(folder), *perplexities(folder)]
    write_rows([*measured, *beside_others(folder, quick=options.quick)], options.out)


if __name__ == "__main__":
    main()
