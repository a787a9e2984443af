"""Commands that write and run recipes: init, run, plan, compile and schema, and stage for a single stage."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    Overrides,
    Queues,
    RecipeFile,
    SkipBad,
    StoreUri,
    check_run_option,
    console,
    parse_shares,
    print_json,
)


def run(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  Typer reads the default and never changes it
    store: StoreUri = DEFAULT_STORE,
    name: Annotated[
        str | None,
        typer.Option(
            "--run", metavar="NAME", callback=check_run_option, help="Name of the run; RECIPE-NUMBER if left out."
        ),
    ] = None,
    skip_bad: SkipBad = False,
) -> None:
    """Run a recipe on this machine; finished stages are reused, and an interrupted one resumes."""
    from pipelines.recipe.schema import load_recipe
    from pipelines.run.finish_run import deliver_run
    from pipelines.run.local_runner import run_recipe

    screen = console()
    loaded = load_recipe(recipe, [*overrides, "data.skip_bad=true"] if skip_bad else overrides)
    done = run_recipe(loaded, store_uri=store, name=name, console=screen)
    deliver_run(store, done, screen)


def plan(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006
    store: StoreUri = DEFAULT_STORE,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME:COUNT",
            help="Predict for these devices, such as H100:8, in place of this machine and of each placement.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show, without running anything, the stages of a recipe, what is cached, what each takes, and all errors."""
    from components.core.store.store import open_store
    from pipelines.recipe.schema import load_recipe
    from pipelines.run.plan import make_plan, plan_as_json, show_plan
    from pipelines.sizing.machine import named_machine, this_machine

    named = None if device is None else named_machine(device)
    planned = make_plan(load_recipe(recipe, overrides), open_store(store), lambda: named or this_machine())
    if as_json:
        print_json(plan_as_json(planned))
    else:
        show_plan(planned, console())
    for warning in planned.prediction.warnings if planned.prediction else ():
        _warn(warning)
    if planned.faults:
        raise typer.Exit(2)


def init(
    parent: Annotated[
        Path, typer.Argument(metavar="PARENT", help="A Hugging Face folder of a Llama, Mistral or Qwen2.")
    ],
    corpus: Annotated[
        list[Path], typer.Option(metavar="PATH", help="Text, or a folder of it, to train and to search on. Repeatable.")
    ] = [],  # noqa: B006
    chats: Annotated[
        list[Path], typer.Option(metavar="PATH", help="Chats, with thinking and without. Repeatable.")
    ] = [],  # noqa: B006
    problems: Annotated[list[Path], typer.Option(metavar="PATH", help="Problems with answers. Repeatable.")] = [],  # noqa: B006
    limits: Annotated[
        list[str],
        typer.Option(metavar="NAME=VALUE", help="Budget of the child, such as latency_ms=70%. Repeatable."),
    ] = [],  # noqa: B006
    out: Annotated[Path, typer.Option(metavar="FILE", help="The recipe that is written.")] = Path("recipe.yaml"),
) -> None:
    """Write a recipe for your model, your data and this machine, in which each value has its reason."""
    from pipelines.run.init_recipe import init_recipe
    from pipelines.sizing.machine import this_machine

    sources = {"corpus": corpus, "chats": chats, "problems": problems}
    machine = this_machine()
    settings = init_recipe(parent, sources, parse_shares(limits), machine, out)
    _warn(machine.busy_warning)
    console().print(
        f"wrote {out} with {len(settings)} settings\n  tessera plan {out}   # what it will take\n  tessera run {out}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _warn(text: str | None) -> None:
    """Say what to doubt, beside the output; nothing where there is nothing."""
    if text is not None:
        console(stderr=True).print(f"warning: {text}", markup=False, highlight=False, soft_wrap=True)


def compile_(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The pipeline's YAML file.")] = Path(
        "pipeline.yaml"
    ),
    overrides: Overrides = [],  # noqa: B006
    store: StoreUri = DEFAULT_STORE,
    name: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="NAME",
            callback=check_run_option,
            help="Name of the run, a label of the pods; none if left out.",
        ),
    ] = None,
    queues: Queues = False,
) -> None:
    """Compile a recipe to a pipeline for Kubeflow Pipelines; the files that it names are copied into the store."""
    from components.core.store.store import open_store
    from pipelines.recipe.checks import check
    from pipelines.recipe.kfp_pipeline import compile_pipeline
    from pipelines.recipe.schema import load_recipe
    from pipelines.run.ingest import ingest_sources

    loaded = load_recipe(recipe, overrides)
    graph = check(loaded)
    target = open_store(store)
    # The pipeline names the user's files by digest, so nothing else can take their place.
    compile_pipeline(graph, ingest_sources(target, loaded), out, run_label=name, queues=queues)
    console().print(f"wrote {out}", highlight=False)


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from pipelines.recipe.schema import recipe_schema

    print_json(recipe_schema())


def stage(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="data, pretrain, search, distill, sft, rl, eval or deploy.")
    ],
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML or JSON file with the stage's settings.")
    ] = None,
    inputs: Annotated[
        list[str],
        typer.Option(
            "--input", metavar="NAME=PATH_OR_URI", help="An input of the stage, or one of a list of them. Repeatable."
        ),
    ] = [],  # noqa: B006
    outputs: Annotated[
        list[str],
        typer.Option(
            "--output",
            metavar="NAME=PATH_OR_URI",
            help="A new folder, or the address of a store, for an output of the stage. Repeatable.",
        ),
    ] = [],  # noqa: B006
    overrides: Overrides = [],  # noqa: B006
    skip_bad: SkipBad = False,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Run one stage alone on files of your own; results are cached and interrupted work resumes, as in a run."""
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
