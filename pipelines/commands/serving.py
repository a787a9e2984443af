"""Commands for a served model: whether a new version may take the place of the old one."""

import importlib
from typing import Annotated, Any

import typer

from pipelines.commands.options import DEFAULT_STORE, StoreUri, console

JUDGE = "components.eval.judge"
"""Imported by name, as stages are: it needs tokenizers, and commands are imported without them."""
Url = Annotated[str, typer.Argument(metavar="URL", help="Base URL of an OpenAI-compatible server, with /v1.")]


def judge(
    stable: Url,
    canary: Url,
    model: Annotated[str, typer.Option(metavar="NAME", help="Name of the model in requests; the same on both.")],
    problems: Annotated[
        str, typer.Option(metavar="ARTIFACT", help="Test problems of the data stage: a digest, or RUN/problems.")
    ],
    store: StoreUri = DEFAULT_STORE,
    questions: Annotated[
        int, typer.Option(help="Number of questions, at least 200; each is asked in both modes.")
    ] = 200,
    tolerance: Annotated[float, typer.Option(help="Fraction of answers by which the canary may be worse.")] = 0.02,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, tokens.")] = 1024,
    concurrency: Annotated[int, typer.Option(help="Questions that are asked at the same time.")] = 8,
    timeout: Annotated[float, typer.Option(help="Seconds after which an answer counts as failed.")] = 600.0,
) -> None:
    """Ask a canary and the stable version the same questions; exit code 1 where the canary is surely worse."""
    from rich.table import Table

    from components.core.base.errors import MissingPackage
    from components.core.store.store import open_store
    from pipelines.lineage.ancestry import find_artifact

    try:
        asking: Any = importlib.import_module(JUDGE)
    except ModuleNotFoundError as error:
        raise MissingPackage(f"this needs {error.name}", hint="pip install 'tessera[serve]'") from None
    opened = open_store(store)
    asked = asking.read_questions(opened.fetch(find_artifact(opened, problems)), questions)
    found = asking.judge(
        (stable, canary),
        model,
        asked,
        tolerance=tolerance,
        max_tokens=max_tokens,
        concurrency=concurrency,
        timeout_s=timeout,
    )
    table = Table("", "stable", "canary", "difference", "99 % interval", "accepted", "questions", "")
    for each in found:
        numbers = (each.stable, each.canary, each.difference)
        low, high = each.interval
        verdict = "worse" if each.is_worse else "good"
        cells = (*(f"{number:.3f}" for number in numbers), f"{low:+.3f} to {high:+.3f}", f"{each.tolerance:g}")
        table.add_row(each.name, *cells, str(each.questions), verdict)
    console().print(table)
    refused = [each.name for each in found if each.is_worse]
    console().print(f"refused: {', '.join(refused)}" if refused else "accepted", highlight=False)
    if refused:
        raise typer.Exit(1)
