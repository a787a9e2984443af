"""Options that commands share, and parsers of option values."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from components.search.solver.score_file import LayerTable

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="The recipe's YAML file, e.g. pipelines/recipes/demo.yaml.")
]


def check_run_option(name: str | None) -> str | None:
    """Return the value of `--run`, where it can be the name of a run."""
    from components.core.base.run_name import check_run_name

    return name if name is None else check_run_name(name)


RunName = Annotated[
    str, typer.Argument(metavar="RUN", help="Name of a run, or `latest` for the one that started last.")
]
StoreUri = Annotated[
    str,
    typer.Option(
        "--store", metavar="URI", envvar="TESSERA_STORE", help="Artifact store: a folder or s3://bucket/prefix."
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Replace a value of the recipe or the settings, e.g. --set sft.num_steps=50. Repeatable.",
    ),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Skip malformed rows of your data instead of stopping with an error.")
]
Queues = Annotated[
    bool,
    typer.Option(
        "--queues",
        envvar="TESSERA_QUEUES",
        help="Pods wait in the Kueue queue of their node pool: placement.node_pool, else gpu or cpu.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

TrustedKeys = Annotated[
    list[Path],
    typer.Option(
        "--trust",
        metavar="KEY",
        envvar="TESSERA_TRUST",
        help="Public key; the model must be signed by one of them, whatever the recipe says. Repeatable.",
    ),
]

DEFAULT_STORE = ".tessera"
PLAIN_WIDTH = 132


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    import json

    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def console(*, stderr: bool = False) -> "Console":
    """Console on standard output or error; a file or pipe gets a fixed width, wide enough for the tables."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH)


def parse_limits(pairs: list[str]) -> dict[str, float]:
    """Limits from NAME=VALUE texts; whole numbers stay integers."""
    import math

    from components.core.base.errors import InputError

    limits: dict[str, float] = {}
    for pair in pairs:
        name, equals, value = pair.rpartition("=")
        try:
            limit = int(value) if value.strip().lstrip("+-").isdecimal() else float(value)
        except ValueError:
            limit = math.nan
        if not equals or not name or not math.isfinite(limit):
            raise InputError(f"--limit {pair!r} is not of the form NAME=VALUE with a finite number")
        if name in limits:
            raise InputError(f"--limit {name} is repeated", hint="remove one")
        limits[name] = limit
    return limits


def parse_shares(pairs: list[str]) -> dict[str, Any]:
    """Limits from NAME=VALUE texts; a value that ends with % is a share of the parent's own, and stays a text."""
    shares = {name: value for name, _, value in (pair.rpartition("=") for pair in pairs) if name and value[-1:] == "%"}
    return {**shares, **parse_limits([pair for pair in pairs if pair.rpartition("=")[0] not in shares])}


def parse_swept_limit(texts: list[str], points: int) -> tuple[str, list[str], dict[str, float]]:
    """Name and values of the swept limit NAME=LOW..HIGH, as texts, and the other limits."""
    from components.core.base.errors import InputError

    swept = [text for text in texts if ".." in text.rpartition("=")[2]]
    if len(swept) != 1:
        raise InputError(
            f"{len(swept)} limits are swept", hint="give one --limit NAME=LOW..HIGH, such as latency_ms=30%..100%"
        )
    name, _, value_range = swept[0].rpartition("=")
    low, _, high = value_range.partition("..")
    unit = "%" if high.endswith("%") else ""
    try:
        least, most = float(low.removesuffix("%")), float(high.removesuffix("%"))
    except ValueError:
        raise InputError(f"--limit {swept[0]!r} is not of the form NAME=LOW..HIGH with numbers") from None
    if not name or bool(unit) != low.endswith("%") or not 0 <= least <= most < float("inf"):
        raise InputError(f"--limit {swept[0]!r} is not of the form NAME=LOW..HIGH, both numbers or both shares")
    steps = [least + (most - least) * k / max(1, points - 1) for k in range(points)]
    return name, [f"{step:.12g}{unit}" for step in steps], parse_limits([text for text in texts if text not in swept])


def parse_batch_sizes(text: str) -> list[int]:
    """Batch sizes from a text such as 1,8,32."""
    from components.core.base.errors import InputError

    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise InputError(f"--batch {text!r} is not a list of batch sizes such as 1,8,32")
    return [int(size) for size in sizes]


def parse_fixed_options(pairs: list[str], layers: "LayerTable") -> dict[int, int]:
    """Options of fixed layers from LAYER=OPTION texts."""
    from components.core.base.errors import InputError

    fixed: dict[int, int] = {}
    for pair in pairs:
        layer, _, option = pair.partition("=")
        if not (layer.isdecimal() and option.isdecimal()):
            raise InputError(f"--fix {pair!r} is not of the form LAYER=OPTION with two numbers, from 0")
        if int(layer) >= len(layers.layers) or int(option) >= len(layers.layers[int(layer)].options):
            raise InputError(f"--fix {pair}: the table has no such layer or option", hint="both are numbered from 0")
        fixed[int(layer)] = int(option)
    return fixed
