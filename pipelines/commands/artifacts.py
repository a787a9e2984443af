"""Commands on artifacts and checkpoints: inspect, export, store."""

from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import DEFAULT_STORE, AsJson, RunName, StoreUri, console, print_json

store_app = typer.Typer(no_args_is_help=True, help="Check a store, and remove what nothing refers to.")


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint folder or a config.json.")],
    as_json: AsJson = False,
) -> None:
    """Tell the architecture, parameters and memory of a checkpoint, also where its weights are absent."""
    from rich.table import Table

    from components.core.inspection import inspect_checkpoint

    facts = inspect_checkpoint(path)
    if as_json:
        print_json(facts)
        return
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console().print(table)


def export(
    run: RunName,
    artifact: Annotated[
        str, typer.Argument(metavar="ARTIFACT", help="parent, child, distilled, sft, rl, bundle, costs, corpus, …")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder that does not exist, or is empty.")],
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Write an artifact of a run as plain files, models as Hugging Face folders."""
    from components.core.store import open_store
    from pipelines import runs
    from pipelines.single import check_free, export

    check_free(str(folder), artifact)
    opened = open_store(store)
    export(opened, runs.artifact(opened, run, artifact), str(folder))
    console().print(f"wrote {folder}", highlight=False, soft_wrap=True)


@store_app.command()
def verify(store: StoreUri = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """Read every byte of a store and compare it with its digest."""
    from components.core.store import open_store

    damage = open_store(store).verify_all()
    if as_json:
        print_json(damage)
    elif damage:
        console().print("\n".join(damage.values()), style="red", markup=False, soft_wrap=True)
    else:
        console().print("every artifact is whole", style="green")
    if damage:
        raise typer.Exit(1)


@store_app.command()
def gc(
    store: StoreUri = DEFAULT_STORE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what no run and no finished stage refers to."""
    from components.core.store import open_store

    removed = open_store(store).gc(dry_run=dry_run)
    if as_json:
        print_json(removed)
    else:
        counts = ", ".join(f"{count:,} {what}" for what, count in removed.items())
        console().print(f"{'would remove' if dry_run else 'removed'} {counts}", highlight=False)
