"""The roofline model against published figures: `python -m tests.bench.roofline [OUT]`, a second, no GPU."""

import statistics
import sys
from pathlib import Path

from components.core.model.accelerators import DEVICES
from components.search.config import Measurement
from components.search.costs.roofline import largest_batch, predicted_model
from tests.bench.published import MOST, SPEEDUPS, Figure, figures, super_speedups
from tests.bench.rows import Row, write_rows


def predict(figure: Figure) -> float:
    """What the model says instead of a figure."""
    device = DEVICES[figure.device]
    load = Measurement(
        batch_size=figure.batch or 1,
        prompt_tokens=figure.prompt,
        new_tokens=figure.new,
        dtype=figure.dtype,
        tensor_parallel=figure.devices,
    )
    if figure.unit == "tokens":
        return float(largest_batch(figure.model, load, device, sys.maxsize) * (figure.prompt + figure.new))
    if figure.batch is None:
        load = load.model_copy(update={"batch_size": largest_batch(figure.model, load, device, MOST)})
    times = predicted_model(figure.model, load, device)
    if figure.unit == "tok/s":
        return 1000 / times.latency_ms
    return 1000 * load.batch_tokens / times.request_ms / figure.devices


def rows() -> list[Row]:
    """Each figure and each speed-up, predicted; the ratio is prediction to publication."""
    found: dict[str, tuple[float, float]] = {}
    told: list[Row] = []
    for figure in figures():
        value = predict(figure)
        found.setdefault(figure.name, (value, figure.value))
        name = f"{figure.name}, {figure.devices} x {figure.device}"
        told.append(Row(name, value, figure.unit, f"published {figure.value:,.6g}", value / figure.value))
    for name, fast, slow in SPEEDUPS:
        value, published = (found[fast][side] / found[slow][side] for side in (0, 1))
        told.append(Row(name, value, "times", f"published {published:.3g}", value / published))
    for name, published, one, other in super_speedups():
        value = predict(one) / predict(other)
        told.append(Row(name, value, "times", f"published {published:.3g}", value / published))
    return told


def main() -> None:
    """Show the rows, and the error over all."""
    found = rows()
    for kind, wanted in (("figures", False), ("speed-ups", True)):
        errors = [abs(row.ratio - 1) for row in found if row.ratio is not None and (row.unit == "times") == wanted]
        within = sum(error <= 0.15 for error in errors)
        median = statistics.median(errors)
        found.append(Row(f"{kind}: median error", median, "", f"{within} of {len(errors)} within 15 %"))
    write_rows(found, Path(sys.argv[1] if len(sys.argv) > 1 else "bench-roofline.json"))


if __name__ == "__main__":
    main()
