"""Costs measured on few layers against costs measured on whole models: `python -m tests.bench.costs OUT`.

The parent has the shape of SmolLM2-135M (or, with `--narrow`, 30 layers of hidden size 256 in float32) and no weights:
vLLM makes random ones. The costs of its sub-blocks are measured on models of four layers, of as many as the search
chooses, and of all 30. Then children of mixed sub-blocks are measured whole, right after the parent, and compared with
what each of the three tables predicts. What counts is a child's share of its parent's time.
"""

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from components.core.model.checkpoint import model_config
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext, quiet_context
from components.core.runtime.placement import Placement
from components.core.serving.engine import BatchTime
from components.core.serving.timing import measure_times
from components.search.config import Measurement, Space
from components.search.costs.measured import architecture_of, measure_costs, write_shape
from components.search.costs.resources import CostTable, measured_layers
from components.search.space.layer_space import PARTS, LayerSpace, Shape, Variant, layer_spaces
from components.search.space.subblocks import shape_of
from tests.bench.rows import Row, write_rows

POSITIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0}, "max_position_embeddings": 2048}
SMOLLM2 = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "tie_word_embeddings": True,
}
NARROW = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1024,
}
MEMORY_GIB = 16.0
WHOLE, CHOSEN, FEW = "whole models", "as many layers as the search chooses", "four layers"
DROPPED = (0.2, 0.35, 0.5, 0.65)
"""For each child, the fraction of its sub-blocks that are gone or the smallest."""


def measure(values: Mapping[str, object], load: Measurement, folder: Path) -> list[Row]:
    """Costs in three ways, and the children that they are to predict."""
    with torch.device("meta"):
        parent = TesseraForCausalLM(model_config({**values, **POSITIONS, "model_type": "llama"}))
    depth = len(parent.model.layers)
    chosen = measured_layers(architecture_of(parent), load)
    ways = {FEW: 4, **({CHOSEN: chosen} if chosen < depth else {}), WHOLE: depth}
    tables: dict[str, CostTable] = {}
    rows: list[Row] = []
    for way, layers in ways.items():
        began = time.monotonic()
        here = folder / way.replace(" ", "-")
        tables[way] = costs(parent, load.model_copy(update={"num_layers": layers}), here)
        rows.append(Row(f"{way} ({layers})", time.monotonic() - began, "s"))
        rows.append(Row(f"{way}: files of the measured models", stored_kib(here), "KiB"))
    shapes = [shape_of(parent.config), *(child_shape(parent, fraction) for fraction in DROPPED)]
    folders = [folder / f"child-{number}" for number in range(len(shapes))]
    for target, shape in zip(folders, shapes, strict=True):
        write_shape(parent, tuple(layer for layer in shape if layer != (0, 0)), target)
    times = measure_times(folders, load, 1, MEMORY_GIB, random_weights=True)
    for phase in ("latency_ms", "time_to_first_token_ms"):
        rows += compared(tables, shapes, [medians(model)[phase] for model in times], phase)
    return rows


def costs(parent: TesseraForCausalLM, load: Measurement, folder: Path) -> CostTable:
    """The costs that the search would measure."""
    context = quiet_context(folder)
    roomy = StageContext(context.reporter, context.resume, context.scratch, Placement(threads=1, memory_gib=MEMORY_GIB))
    return measure_costs(parent, spaces_of(parent), load, roomy)


def spaces_of(parent: TesseraForCausalLM) -> list[LayerSpace]:
    """What each layer may have."""
    return layer_spaces(Space(), shape_of(parent.config))


def stored_kib(folder: Path) -> float:
    """Size of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1024


def child_shape(parent: TesseraForCausalLM, fraction: float) -> Shape:
    """Sub-blocks at random, of which a fraction is gone or the smallest; the first layer has its attention."""
    rng = random.Random(str(fraction))

    def pick(options: Sequence[Variant], first: bool) -> Variant:
        served = [option for option in options if not (first and option.is_no_op)]
        return rng.choice(served[-2:]) if rng.random() < fraction else rng.choice(served[:2])

    return tuple(
        (pick(space.attention, layer == 0).size, pick(space.ffn, layer == 0).size)
        for layer, space in enumerate(spaces_of(parent))
    )


def medians(times: Sequence[BatchTime]) -> dict[str, float]:
    """Medians over the rounds, by the name that costs have."""
    return {
        "latency_ms": statistics.median(time.step_ms for time in times),
        "time_to_first_token_ms": statistics.median(time.first_token_ms for time in times),
    }


def compared(
    tables: Mapping[str, CostTable], shapes: Sequence[Shape], measured_ms: Sequence[float], phase: str
) -> list[Row]:
    """Shares of the parent's time: predicted by each table, and measured."""
    rows: list[Row] = []
    for way, table in tables.items():
        predicted_ms = [
            table.fixed.of(phase)
            + sum(
                table.blocks[Variant(part, size).name].of(phase)
                for layer in shape
                for part, size in zip(PARTS, layer, strict=True)
            )
            for shape in shapes
        ]
        rows.append(Row(f"{phase}, parent, {way}", predicted_ms[0], "ms", f"measured {measured_ms[0]:.4g} ms", None))
        errors = []
        for number in range(1, len(shapes)):
            share, true = predicted_ms[number] / predicted_ms[0], measured_ms[number] / measured_ms[0]
            errors.append(share / true - 1)
            rows.append(Row(f"{phase}, child {number}, {way}", share, "of 1", f"measured {true:.4f}", share / true))
        rms = statistics.fmean(error**2 for error in errors) ** 0.5
        rows.append(Row(f"{phase}, error of a child, {way}", 100 * rms, "%", "root mean square", None))
        rows.append(Row(f"{phase}, largest, {way}", 100 * max(map(abs, errors)), "%"))
    return rows


def main() -> None:
    """Measure, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--narrow", action="store_true", help="30 layers of hidden size 256, float32")
    parser.add_argument("--batch", type=int, default=8, help="requests decoded together")
    parser.add_argument("--rounds", type=int, default=7, help="in which all models are measured in turn")
    options = parser.parse_args()
    values, dtype = (NARROW, "float32") if options.narrow else (SMOLLM2, "bfloat16")
    load = Measurement.parse(
        {"batch_size": options.batch, "prompt_tokens": 16, "new_tokens": 16, "rounds": options.rounds, "dtype": dtype}
    )
    with tempfile.TemporaryDirectory() as folder:
        write_rows(measure(values, load, Path(folder)), options.out)


if __name__ == "__main__":
    main()
