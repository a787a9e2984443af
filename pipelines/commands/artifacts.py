"""Commands on models and artifacts: chat, serve, inspect, export, store."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from pipelines.commands.options import DEFAULT_STORE, AsJson, RunName, StoreUri, TrustedKeys, console, print_json

store_app = typer.Typer(no_args_is_help=True, help="Create, check, list, sign and clean up a store.")


def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint folder or a config.json.")],
    as_json: AsJson = False,
) -> None:
    """Show the architecture, parameters and memory of a checkpoint; config.json alone is enough."""
    from rich.table import Table

    from components.core.model.inspection import inspect_checkpoint

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
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A new or empty folder.")],
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Copy an artifact of a run into a folder; a model becomes a Hugging Face folder."""
    from components.core.store.store import open_store
    from pipelines.records import runs
    from pipelines.run.single_stage import check_free, export

    check_free(str(folder), artifact)
    opened = open_store(store)
    export(opened, runs.artifact(opened, run, artifact), str(folder))
    console().print(f"wrote {folder}", highlight=False, soft_wrap=True)


def serve(
    run: RunName = "latest",
    port: Annotated[int | None, typer.Option(help="Port to listen at.", show_default="the recipe's")] = None,
    store: StoreUri = DEFAULT_STORE,
    trust: TrustedKeys = [],  # noqa: B006
) -> None:
    """Serve the last model of a run through the OpenAI API; the run's name is the model's, and Ctrl-C stops it."""
    from pipelines.run.chat import serve_run

    serve_run(run, port, store, console(), trust)


def chat(
    run: RunName = "latest",
    thinking: Annotated[Literal["on", "off"], typer.Option(help="Whether the model thinks before it answers.")] = "on",
    store: StoreUri = DEFAULT_STORE,
    trust: TrustedKeys = [],  # noqa: B006
) -> None:
    """Chat with the last model of a run; an empty line or Ctrl-D ends the chat."""
    from pipelines.run.chat import chat_with_run

    chat_with_run(run, thinking, store, console(), trust)


@store_app.command()
def path(store: StoreUri = DEFAULT_STORE) -> None:
    """Print the address of a store."""
    from components.core.store.store import open_store

    typer.echo(open_store(store).uri)


@store_app.command()
def init(
    uri: Annotated[
        str,
        typer.Argument(metavar="URI", envvar="TESSERA_STORE", help="A folder or s3://bucket/prefix, as in --store."),
    ],
) -> None:
    """Create the bucket of a store and its lifecycle rule, then check access; exit code 2 if a check fails."""
    from components.core.store.store_setup import init_store

    failed = False
    for step in init_store(uri):
        failed |= not step.passed
        style = None if step.passed else "red"
        console().print(f"{step.name}: {step.result}", style=style, markup=False, highlight=False, soft_wrap=True)
    if failed:
        raise typer.Exit(2)


@store_app.command("list")
def list_(store: StoreUri = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """List the artifacts of a store with their kind, size, producing stages and runs."""
    from rich.table import Table

    from components.core.store.store import open_store
    from pipelines.records.runs import list_artifacts

    found = list_artifacts(open_store(store))
    if as_json:
        print_json(found)
        return
    table = Table("digest", "kind", "files", "bytes", "produced by", "roles")
    for artifact in found:
        producers = (
            ", ".join(sorted({f"{maker['stage']}.{maker['output']}" for maker in artifact["made_by"]})) or "source"
        )
        size = [f"{artifact[name]:,}" if artifact["kind"] else "" for name in ("files", "bytes")]
        table.add_row(
            artifact["digest"][:12], artifact["kind"] or "damaged", *size, producers, ", ".join(artifact["roles"])
        )
    console().print(table)


@store_app.command()
def fetch(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A digest, or RUN/ROLE.")],
    store: StoreUri = DEFAULT_STORE,
    trust: TrustedKeys = [],  # noqa: B006
) -> None:
    """Fetch an artifact, verify every byte and its signature, and print its folder; a whole copy is used again."""
    from components.core.store.signatures import demand_signature
    from components.core.store.store import open_store
    from pipelines.lineage.ancestry import find_artifact

    opened = open_store(store)
    digest = find_artifact(opened, artifact)
    if trust:
        demand_signature(opened, digest, trust, "artifact")
    typer.echo(opened.fetch(digest))


@store_app.command()
def sign(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="A digest, or RUN/ROLE.")],
    key: Annotated[
        Path, typer.Option(envvar="TESSERA_SIGNING_KEY", help="File of the private key, PEM: P-256 or Ed25519.")
    ],
    store: StoreUri = DEFAULT_STORE,
) -> None:
    """Sign an artifact after verifying every byte of it."""
    from components.core.store.signatures import sign_artifact
    from components.core.store.store import open_store
    from pipelines.lineage.ancestry import find_artifact

    opened = open_store(store)
    digest = find_artifact(opened, artifact)
    name = sign_artifact(opened, digest, key)
    console().print(f"signed {digest} with the key {name}", highlight=False, soft_wrap=True)


@store_app.command()
def verify(
    store: StoreUri = DEFAULT_STORE,
    manifests: Annotated[
        bool, typer.Option("--manifests", help="Check manifests only, without reading the files.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check every file of a store against its digest; exit code 1 if anything is damaged."""
    from components.core.store.store import open_store
    from components.core.store.verification import find_faults
    from pipelines.recipe.registry import output_kinds

    damage = find_faults(open_store(store), output_kinds(), contents=not manifests)
    if as_json:
        print_json(damage)
    elif damage:
        lines = (f"{name}\n  {fault}" for name, fault in damage.items())
        console().print("\n".join(lines), style="red", markup=False, highlight=False, soft_wrap=True)
    else:
        console().print("everything is whole", style="green")
    if damage:
        raise typer.Exit(1)


@store_app.command()
def gc(
    store: StoreUri = DEFAULT_STORE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print what would be removed.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what no run and no finished stage refers to; safe while runs are active."""
    from components.core.store.garbage_collection import collect_garbage
    from components.core.store.store import open_store

    removed = collect_garbage(open_store(store), dry_run=dry_run)
    if as_json:
        print_json(removed)
    else:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in removed.items())
        console().print(f"{'would remove' if dry_run else 'removed'} {counts}", highlight=False)
