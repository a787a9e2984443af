"""What benchmarks write: rows of one JSON file, each a number with what it was measured against; and progress."""

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """One measured number.

    Attributes:
        name: what was measured.
        value: ours.
        unit: of the value.
        versus: what it is compared with, in words; empty where it stands alone.
        ratio: how many times better than that, above 1 where ours is better; a share where `versus` names a whole.
    """

    name: str
    value: float
    unit: str
    versus: str = ""
    ratio: float | None = None


def write_rows(rows: list[Row], out: Path) -> None:
    """Write the rows, and show them."""
    out.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n", encoding="utf-8")
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:10.3f}"
        print(f"{row.name:44} {row.value:12.4g} {row.unit:8} {ratio:>10}  {row.versus}")  # noqa: T201


def tell(text: object) -> None:
    """Say on standard error how far a benchmark is."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


def in_turn(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Measure all sides in turn, round by round, so that what slows the machine slows them alike; the medians."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(sides[name]())
            tell(f"round {number + 1} of {rounds}, {name}: {found[name][-1]:.4g}")
    return {name: statistics.median(values) for name, values in found.items()}
