"""The command `tessera`."""

import sys

import typer

from pipelines.commands import artifacts, cluster, promotion, recipes, records, retraining, search, serving

app = typer.Typer(
    name="tessera",
    help="Turn a dense language model into a smaller, faster reasoning model that thinks on request, and serve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
RECIPES, RECORDS, MODELS = "Recipes", "Records of runs", "Models and artifacts"
app.command(rich_help_panel=RECIPES)(recipes.init)
app.command(rich_help_panel=RECIPES)(recipes.run)
app.command(rich_help_panel=RECIPES)(recipes.plan)
app.command("compile", rich_help_panel=RECIPES)(recipes.compile_)
app.command(rich_help_panel=RECIPES)(cluster.submit)
app.add_typer(cluster.cluster_app, name="cluster", rich_help_panel=RECIPES)
app.add_typer(retraining.retrain_app, name="retrain", rich_help_panel=RECIPES)
app.command(rich_help_panel=RECIPES)(retraining.operator)
app.command(rich_help_panel=RECIPES)(recipes.schema)
app.command(rich_help_panel=RECIPES)(recipes.stage)
app.command(rich_help_panel=RECORDS)(records.runs)
app.command(rich_help_panel=RECORDS)(records.report)
app.command(rich_help_panel=RECORDS)(records.lineage)
app.command(rich_help_panel=RECORDS)(records.ui)
app.command(rich_help_panel=MODELS)(artifacts.chat)
app.command(rich_help_panel=MODELS)(artifacts.serve)
app.command(rich_help_panel=MODELS)(serving.judge)
app.command(rich_help_panel=MODELS)(artifacts.inspect)
app.command(rich_help_panel=MODELS)(artifacts.export)
app.command(rich_help_panel=MODELS)(promotion.promote)
app.add_typer(search.search_app, name="search", rich_help_panel=MODELS)
app.add_typer(artifacts.store_app, name="store", rich_help_panel=MODELS)


@app.callback()
def options(
    debug: bool = typer.Option(False, "--debug", help="Show a traceback on errors."),
) -> None:
    """Options before the command; `main` accepts --debug at any position."""


def main() -> None:
    """Run the command; an error becomes a message and an exit code."""
    debug = "--debug" in sys.argv
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    sys.exit(run_command(arguments, debug=debug))


def run_command(arguments: list[str], *, debug: bool = False) -> int:
    """Run a command line; returns its exit code: 0 good, 1 the work failed, 2 wrong use or input."""
    from components.core.base.errors import TesseraError
    from components.core.base.ports import never_proxy_loopback

    never_proxy_loopback()  # here also for MLflow, and for the stages, which inherit the environment
    try:
        app(args=arguments, prog_name="tessera")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 0
    except TesseraError as error:
        if debug:
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(f"{type(error).__name__}: {error}\n  hint: add --debug for the traceback\n")
        return 1
    return 0
