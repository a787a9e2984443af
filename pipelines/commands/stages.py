"""`tessera stage`: one stage on a user's own files."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import DEFAULT_STORE, AsJson, Overrides, SkipBad, StoreUri, console, print_json


def stage(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="data, pretrain, search, distill, sft, rl, eval, deploy, …")
    ],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML or JSON file with the stage's settings.")
    ] = None,
    inputs: Annotated[
        list[str],
        typer.Option("--input", metavar="NAME=PATH_OR_URI", help="An input; repeat for each, and for each of a list."),
    ] = [],  # noqa: B006
    outputs: Annotated[
        list[str],
        typer.Option("--output", metavar="NAME=PATH_OR_URI", help="Where to write an output: a new folder or a store."),
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    skip_bad: SkipBad = False,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Run one stage on files of your own, with the same cache and resume as in a run."""
    from components.core.store.store import open_store
    from pipelines.recipe.registry import find_stage
    from pipelines.recipe.schema import load_settings
    from pipelines.run.single_stage import pairs, run_single

    declared = find_stage(name)
    settings = load_settings(config, overrides)
    if skip_bad:
        settings["skip_bad"] = True
    screen = console(stderr=as_json)
    record = run_single(declared, settings, pairs(inputs), pairs(outputs), open_store(store), screen)
    if as_json:
        print_json(record.canonical())
        return
    for name, value in record.result.items():
        screen.print(f"{name}: {value}", highlight=False, markup=False, soft_wrap=True)
    for output in declared.outputs:
        screen.print(f"{output} {record.outputs.get(output, 'not made')}", highlight=False, soft_wrap=True)
