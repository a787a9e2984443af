"""Commands for the `Retraining` objects of a cluster: retrain, and the operator."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from pipelines.commands.cluster import KfpUrl, Namespace
from pipelines.commands.options import DEFAULT_STORE, AsJson, Overrides, Queues, StoreUri, console, print_json

if TYPE_CHECKING:
    from pipelines.retraining.cluster import Retraining


class _NameOrCommand(TyperGroup):
    """`retrain NAME` is `retrain object NAME`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Insert the name of the command where there is none."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            args = ["object", *args]
        return super().parse_args(ctx, args)


retrain_app = typer.Typer(
    cls=_NameOrCommand,
    help="Look at a Retraining of the cluster and steer it (`retrain NAME`), or price a change of a recipe.",
    no_args_is_help=True,
)


@retrain_app.command("object")
def steer(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the Retraining; `object` may be left out.")],
    namespace: Namespace = "kubeflow",
    approve: Annotated[bool, typer.Option("--approve", help="Approve the plan that waits.")] = False,
    suspend: Annotated[
        bool | None,
        typer.Option(
            "--suspend/--resume", help="Start no run, or do again. Where Git has the object, change it there instead."
        ),
    ] = None,
    now: Annotated[bool, typer.Option("--now", help="Run now, although nothing has changed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a Retraining; approve its plan, suspend it or ask for a run."""
    from components.core.base.errors import InputError
    from components.core.base.kubernetes_api import load_cluster
    from pipelines.retraining.cluster import ClusterObjects
    from pipelines.retraining.spec import APPROVED, NOW

    load_cluster()
    objects = ClusterObjects()
    found = objects.read(namespace, name)
    if found is None:
        raise InputError(f"there is no Retraining {name!r} in namespace {namespace}", hint="--namespace NAME")
    annotations: dict[str, str] = {NOW: str(time.time_ns())} if now else {}
    if approve:
        if found.status.plan is None:
            raise InputError(f"no plan of {name!r} waits for approval: it is {found.status.phase or 'new'}")
        annotations[APPROVED] = found.status.plan.run
    change: dict[str, Any] = {"metadata": {"annotations": annotations}} if annotations else {}
    if suspend is not None:
        change["spec"] = {"suspend": suspend}
    if change:
        objects.merge(namespace, name, change)
    if as_json:
        print_json(found.status.dump())
    elif not change:
        _show(found)
    else:
        console().print(f"{name}: asked; `tessera retrain {name}` shows what comes of it", highlight=False)


@retrain_app.command()
def diff(
    recipe: Annotated[Path, typer.Argument(metavar="FILE", help="The changed recipe.")],
    overrides: Overrides = [],  # noqa: B006  Typer reads the default and never changes it
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Print as Markdown what a recipe would run anew, and its GPU hours by the times of earlier runs."""
    import sys

    from components.core.store.store import open_store
    from pipelines.recipe.checks import check
    from pipelines.recipe.schema import load_recipe
    from pipelines.retraining.price import earlier_runs, price_page, price_run
    from pipelines.run.plan import source_digests

    loaded, opened = load_recipe(recipe, overrides), open_store(store)
    check(loaded)
    runs = earlier_runs(opened, loaded.name)
    sys.stdout.write(price_page(loaded.name, price_run(loaded, source_digests(loaded, opened), opened, runs), runs))


def operator(
    namespace: Namespace = "kubeflow",
    kfp: KfpUrl = None,
    queues: Queues = False,
    service_account: Annotated[
        str | None,
        typer.Option(metavar="NAME", envvar="TESSERA_SERVICE_ACCOUNT", help="Service account of the pods of the runs."),
    ] = None,
    liveness: Annotated[
        str | None, typer.Option(metavar="URL", help="Address to answer at, e.g. http://0.0.0.0:8080/healthz.")
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML with Git repositories, signing key and Alertmanager."),
    ] = None,
) -> None:
    """Run the Retraining objects of a namespace, until a signal ends this."""
    import logging

    from components.core.base.errors import MissingPackage
    from pipelines.promotion.platform_settings import read_settings

    try:
        from pipelines.retraining.kopf_operator import run_operator
    except ModuleNotFoundError as error:
        raise MissingPackage(f"the operator needs {error.name}", hint="pip install 'tessera[operator]'") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # else a line for each object and step
    run_operator(
        namespace, kfp, service_account, queues=queues, settings=read_settings(settings), liveness_url=liveness
    )


def _show(found: "Retraining") -> None:
    """The state of an object: its run, conditions, stages and past runs."""
    from rich.table import Table

    status, screen = found.status, console()
    screen.print(f"{found.name}: {status.phase or 'new'} ({status.reason or '-'})", style="bold", highlight=False)
    conditions = Table("condition", "", "reason", "message", title=f"run {status.run_id or '-'}", title_justify="left")
    for each in status.conditions:
        conditions.add_row(each.type, each.status, each.reason, each.message)
    screen.print(conditions)
    if status.runs:
        runs = Table("run", "state", "trigger", "finished", "GPU hours")
        for past in status.runs:
            runs.add_row(past.run, past.state, past.trigger, f"{past.finished:%Y-%m-%d %H:%M}", f"{past.gpu_hours:g}")
        screen.print(runs)
