"""Options that several commands share."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. pipelines/recipes/demo.yaml.")]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="Name of a run, or `latest`.")]
StoreUri = Annotated[
    str,
    typer.Option(
        "--store", metavar="URI", envvar="TESSERA_STORE", help="Where artifacts are: a folder or s3://bucket/prefix."
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option("--set", metavar="KEY=VALUE", help="Override a dotted key, e.g. --set sft.num_steps=50. Repeatable."),
]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave malformed rows out instead of stopping.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]

TrustedKeys = Annotated[
    list[Path],
    typer.Option(
        "--trust",
        metavar="KEY",
        envvar="TESSERA_TRUST",
        help="A public key, one of which must have signed the model, whatever the recipe says. Repeatable.",
    ),
]

DEFAULT_STORE = ".tessera"
PLAIN_WIDTH = 132


def print_json(value: Any) -> None:
    """Print a value as JSON for other programs to read."""
    import json

    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def console(*, stderr: bool = False) -> "Console":
    """The terminal; a file or a pipe has no width of its own, and gets one that tables fit in."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH)
