"""What a recipe would run anew, and its price, as Markdown: for a comment on the change that proposes it."""

from collections.abc import Sequence

from pipelines.retraining.price import SECONDS_PER_HOUR, StagePrice


def price_page(name: str, prices: Sequence[StagePrice], runs: Sequence[str]) -> str:
    """The page.

    Args:
        name: of the recipe.
        prices: of its stages.
        runs: names of the runs that gave the times, newest first.
    """
    anew = [each for each in prices if not each.is_reused]
    unmeasured = [each.label for each in prices if each.gpu_hours is None]
    hours = sum(each.gpu_hours or 0.0 for each in prices)
    source = f"by the times of run `{runs[0]}` and those before it" if runs else "no run has measured this recipe yet"
    lines = [
        f"### Recipe `{name}`: {len(anew)} of {len(prices)} stages run anew, {hours:.3g} GPU hours",
        "",
        "| Stage | Result | Last time | GPU hours |",
        "|---|---|---|---|",
        *map(_row, prices),
        "",
        f"Estimate {source}" + (f"; not measured: {', '.join(unmeasured)}." if unmeasured else "."),
    ]
    return "\n".join(lines) + "\n"


def _row(price: StagePrice) -> str:
    """A stage."""
    result = "reused" if price.is_reused else "**anew**"
    last = "" if price.seconds is None else f"{price.seconds / SECONDS_PER_HOUR:.2f} h"
    hours = "not measured" if price.gpu_hours is None else f"{price.gpu_hours:.3g}" if price.gpu_hours else ""
    return f"| {price.label} | {result} | {last} | {hours} |"
