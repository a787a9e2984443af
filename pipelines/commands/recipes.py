"""Commands on a recipe: run, plan, compile, schema."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import (
    DEFAULT_STORE,
    AsJson,
    Overrides,
    RecipeFile,
    SkipBad,
    StoreUri,
    check_run_option,
    console,
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
    """Run a recipe on this machine, from where an earlier run of it got to."""
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
    as_json: AsJson = False,
) -> None:
    """Show the stages of a recipe, what is cached, what each will need, and what is wrong."""
    from components.core.store.store import open_store
    from pipelines.recipe.schema import load_recipe
    from pipelines.run.plan import make_plan, plan_as_json, show_plan

    planned = make_plan(load_recipe(recipe, overrides), open_store(store))
    if as_json:
        print_json(plan_as_json(planned))
    else:
        show_plan(planned, console())
    if planned.faults:
        raise typer.Exit(2)


def compile_(
    recipe: RecipeFile,
    out: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write the pipeline.")] = Path(
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
) -> None:
    """Write a recipe as a pipeline that a Kubeflow Pipelines server takes; files it names go into the store."""
    from components.core.store.store import open_store
    from pipelines.recipe.checks import check
    from pipelines.recipe.kfp_pipeline import compile_pipeline
    from pipelines.recipe.llama_nemotron import sources_of
    from pipelines.recipe.schema import load_recipe
    from pipelines.recipe.source_files import KINDS
    from pipelines.run.ingest import ingest
    from pipelines.run.trust import demand_sources

    loaded = load_recipe(recipe, overrides)
    graph = check(loaded)
    target = open_store(store)
    sources = {source: ingest(target, source, paths, KINDS[source]) for source, paths in sources_of(loaded).items()}
    demand_sources(target, loaded, sources)  # the pipeline names them by digest: nothing else can take their place
    compile_pipeline(graph, sources, out, run_label=name)
    console().print(f"wrote {out}", highlight=False)


def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    from pipelines.recipe.json_schema import recipe_schema

    print_json(recipe_schema())
