"""How seconds grow with the size of what is measured: a plot for the page of the benchmarks."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt


class Growth(NamedTuple):
    """Seconds over one size, all others as they are.

    Attributes:
        what: the size.
        numbers: its values.
        ours: CPU seconds at each of them.
        versus: what those are compared with.
    """

    what: str
    numbers: Sequence[int]
    ours: Sequence[float]
    versus: Sequence[float]


def plot_growths(path: Path, growths: Sequence[Growth], versus: str) -> None:
    """Draw them side by side on logarithmic axes, ours solid, `versus` dotted; an SVG that has no date in it."""
    figure, axes = plt.subplots(
        1, len(growths), figsize=(3 * len(growths), 2.6), sharey=True, layout="constrained", squeeze=False
    )
    for growth, axis in zip(growths, axes[0], strict=True):
        axis.loglog(growth.numbers, growth.ours, "o-", color="tab:blue", base=2, label="ours")
        axis.loglog(growth.numbers, growth.versus, ":", color="gray", base=2, label=versus)
        axis.set_xlabel(growth.what)
    axes[0][0].set_ylabel("CPU seconds")
    axes[0][0].legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
