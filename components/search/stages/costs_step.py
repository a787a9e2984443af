"""The stage that says what every sub-block costs."""

from pathlib import Path

import torch
from pydantic import JsonValue

from components.core.model.inspection import stored_dtype
from components.core.runtime.context import StageContext
from components.search.config import CostsConfig
from components.search.costs.measured import measure_costs, own_costs_of
from components.search.costs.resources import COSTS_FILE
from components.search.library.calibration import load_parent
from components.search.space.layer_space import layer_spaces, left_out, servable_spaces
from components.search.space.library_table import write_record
from components.search.space.subblocks import shape_of


def costs(
    config: CostsConfig, *, context: StageContext, out: Path, parent: Path, own_costs: Path | None = None
) -> dict[str, JsonValue]:
    """Block costs, measured here or given. Source: arXiv 2411.19146, section 4.1."""
    model = load_parent(parent, context, device=torch.device("cpu"))  # leaves the memory of a GPU to vLLM
    spaces = servable_spaces(layer_spaces(config, shape_of(model.config)), config.measurement.tensor_parallel)
    if note := left_out(config, shape_of(model.config)):
        context.note(note)
    if own_costs is None:
        table = measure_costs(model, spaces, config.measurement.served_as(stored_dtype(parent)), context)
    else:
        table = own_costs_of(model, spaces, own_costs)
    write_record(out / "costs" / COSTS_FILE, table)
    return {
        "fixed_ms": table.fixed.latency_ms,
        **{f"{name}_ms": block.latency_ms for name, block in table.blocks.items()},
    }
