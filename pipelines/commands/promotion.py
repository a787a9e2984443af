"""The command that promotes by hand: promote."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.options import DEFAULT_STORE, AsJson, RunName, StoreUri, console, print_json
from pipelines.promotion.measures import MEASURES, served_key


def promote(
    run: RunName,
    to: Annotated[
        Path | None,
        typer.Option(
            "--to",
            metavar="FILE",
            help="YAML file that names the served bundle, in a working copy; changed if it passes.",
        ),
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            help=f"Dotted key of the digest in FILE; by default {served_key('NAME')}, NAME being that of the recipe.",
        ),
    ] = None,
    when: Annotated[
        list[str],
        typer.Option(metavar="MEASURE", help=f"Measure that decides: {', '.join(MEASURES)}. Repeatable."),
    ] = ["accuracy_on"],  # noqa: B006  Typer reads the default and never changes it
    confidence: Annotated[float, typer.Option(help="Confidence of the intervals.")] = 0.95,
    tolerance: Annotated[
        float, typer.Option(help="Largest loss that is accepted: 0.03 is 3 points, of perplexity and speed 3 %.")
    ] = 0.03,
    sign: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Private key (PEM) that signs the bundle, if it passes.")
    ] = None,
    served: Annotated[
        bool, typer.Option("--served", help="The bundle serves all traffic now: make it the champion of the registry.")
    ] = False,
    store: StoreUri = DEFAULT_STORE,
    as_json: AsJson = False,
) -> None:
    """Compare the bundle of a run with the one that FILE names, print the page, and put its digest into FILE.

    Accuracy and format are compared on the problems that both models were asked, as the store has recorded it. If the
    bundle does not pass, FILE stays as it is and the exit code is 1. Commit and push FILE yourself. Once the bundle
    serves all traffic, `tessera promote RUN --served` moves the alias `champion`.
    """
    from components.core.base.errors import InputError, TesseraError
    from components.core.store.store import open_store
    from pipelines.promotion.evidence import gather_evidence
    from pipelines.promotion.rules import PromotionRules
    from pipelines.promotion.served_file import read_value, replace_value
    from pipelines.records.runs import find_run, run_record

    if (to is None) != served:
        raise InputError("name what to do", hint="--to FILE puts the digest into a file, --served moves the alias")
    opened = open_store(store)
    name = find_run(opened, run)
    if to is None:
        _make_champion(store, name)
        return
    key = key or served_key(str(run_record(opened, name)["recipe_name"]))
    values = {"when": tuple(when), "confidence": confidence, "tolerance": tolerance}
    rules = PromotionRules.parse(values, where="options")
    try:
        text = to.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{to} cannot be read: {error}") from None
    champion = read_value(text, key, str(to))
    evidence = gather_evidence(opened, name, champion, rules, sign)
    gate = evidence.gate
    if as_json:
        print_json(gate.model_dump(mode="json"))
    else:
        sys.stdout.write(evidence.page)
    if not gate.passed:
        raise TesseraError(f"the gate is not passed, {to} stays as it is: {gate.message}")
    if champion == gate.bundle:
        console(stderr=True).print(f"{to} names this bundle already", highlight=False, soft_wrap=True)
        return
    _replace_text(to, replace_value(text, key, gate.bundle, str(to)))
    console(stderr=True).print(f"{to}: {key} is {gate.bundle} now; commit and push it", highlight=False, soft_wrap=True)


def _replace_text(file: Path, text: str) -> None:
    """Replace the text of a file, whole or not at all; a link stays one, and the file's mode is as before."""
    from components.core.store.folder_store import FolderStore

    target = file.resolve()
    mode = target.stat().st_mode
    FolderStore(target.parent).put(target.name, text.encode())
    target.chmod(mode)


def _make_champion(store_uri: str, run: str) -> None:
    """Move the alias of the registered model to the bundle of a run."""
    from components.core.base.errors import InputError
    from components.core.lineage.champion import move_champion
    from components.core.store.store import open_store
    from pipelines.promotion.evaluation import evaluation_of_run
    from pipelines.run.finish_run import tracking_uri

    store = open_store(store_uri)
    found = evaluation_of_run(store, run)
    name = found.deploy.result.get("registered_model")
    if not isinstance(name, str):
        raise InputError(f"the bundle of run {run!r} has no name in the registry", hint="set deploy.name in the recipe")
    move_champion(store, name, found.bundle, tracking_uri(store))
    console().print(f"the champion of {name} is bundle {found.bundle} of run {run}", highlight=False, soft_wrap=True)
