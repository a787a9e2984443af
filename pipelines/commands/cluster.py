"""Commands that work on a cluster: submit, and cluster check."""

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
    print_json,
)

cluster_app = typer.Typer(help="Look at a cluster.", no_args_is_help=True)

KfpUrl = Annotated[
    str | None,
    typer.Option(
        "--kfp",
        metavar="URL",
        envvar="TESSERA_KFP",
        help="Address of Kubeflow Pipelines; the service in the cluster of KUBECONFIG if left out.",
    ),
]
Namespace = Annotated[
    str, typer.Option("--namespace", "-n", metavar="NAME", envvar="TESSERA_NAMESPACE", help="Namespace of the pods.")
]


def submit(
    recipe: RecipeFile,
    overrides: Overrides = [],  # noqa: B006  Typer reads the default and never changes it
    store: StoreUri = DEFAULT_STORE,
    kfp: KfpUrl = None,
    namespace: Namespace = "kubeflow",
    name: Annotated[
        str | None,
        typer.Option(
            "--run",
            metavar="NAME",
            callback=check_run_option,
            help="Name of the run; the recipe's name and a digest of what it runs if left out.",
        ),
    ] = None,
    queues: Queues = False,
    service_account: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            envvar="TESSERA_SERVICE_ACCOUNT",
            help="Service account of the pods; the chart makes tessera-pipelines. That of Kubeflow if left out.",
        ),
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Show the progress until the run ends.")] = False,
    cancel: Annotated[bool, typer.Option("--cancel", help="End the run of the recipe instead.")] = False,
    skip_bad: SkipBad = False,
) -> None:
    """Run a recipe on Kubeflow Pipelines; the same recipe again finds the run that is there."""
    from components.core.base.errors import InputError
    from pipelines.recipe.schema import load_recipe
    from pipelines.run.kfp_server import KfpServer
    from pipelines.run.submit import Submitter, pod_store

    if watch and cancel:
        raise InputError("--watch and --cancel exclude each other", hint="leave one out")
    pod_store(store)  # before the server is asked, which may take a while
    loaded = load_recipe(recipe, [*overrides, "data.skip_bad=true"] if skip_bad else overrides)
    screen, server = console(), KfpServer(kfp, namespace, service_account)
    submitter = Submitter(store, server, namespace, queues=queues, console=screen)
    if cancel:
        submitter.cancel(found := submitter.find(loaded, name))
        screen.print(f"run {found.name} is being cancelled", highlight=False)
        return
    submitted = submitter.submit(loaded, name)
    assert submitted.kfp is not None
    if submitted.is_new:
        state = "is submitted"
    elif submitted.kfp.is_active:
        state = "is there already, and goes on"
    else:
        state = "has succeeded already; --run NAME makes another"
    screen.print(f"run {submitted.name} {state}", style="bold", highlight=False, soft_wrap=True)
    screen.print(f"page   {server.page(submitted.kfp.id)}", highlight=False, soft_wrap=True)
    if watch:
        submitter.watch(submitted)


@cluster_app.command()
def check(namespace: Namespace = "kubeflow", kfp: KfpUrl = None, as_json: AsJson = False) -> None:
    """Show what a cluster has and lacks to run recipes, and how to mend it."""
    from pipelines.run.cluster_check import check_cluster, show_checks

    checks = list(check_cluster(namespace, kfp))
    if as_json:
        print_json([found._asdict() for found in checks])
    else:
        show_checks(checks, console())
    if any(found.passed is False for found in checks):
        raise typer.Exit(1)
