"""Writes a recipe for a user's model, data and machine, in which each value has its reason."""

import importlib
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from components.core.base.errors import InputError, MissingPackage
from components.core.model.inspection import check_checkpoint, read_config, stored_dtype
from components.data.data_facts import DataFacts
from components.search.config import Limits
from components.search.costs.work_time import Computer
from pipelines.recipe.checks import check
from pipelines.recipe.schema import load_recipe
from pipelines.recipe.setting_rules.all_settings import DEFAULT_LIMITS, all_settings
from pipelines.recipe.setting_rules.facts import DEFAULT_CONTEXT, Facts, Setting
from pipelines.recipe.source_files import KINDS, files_of
from pipelines.run.ingest import staged
from pipelines.sizing.machine import Machine, speed_in_words

SURVEY = "components.data.survey"
"""Imported by name, as stages are: it needs tokenizers and transformers, and commands are imported without them."""
SECTIONS = (
    *("name", "seed", "parent", "corpus", "placement", "targets", "serving"),
    *("search", "distill", "pretrain", "sft", "rl", "eval", "deploy"),
)
"""Keys of a recipe in the order in which they are written."""
WIDTH = 118


def init_recipe(
    parent: Path,
    sources: Mapping[str, Sequence[Path]],
    limits: Mapping[str, JsonValue],
    machine: Machine,
    out: Path,
) -> list[Setting]:
    """Look at model and data, choose the settings for this machine, and write the recipe.

    Args:
        parent: a Hugging Face folder.
        sources: paths of the user's files by `corpus`, `chats` and `problems`.
        limits: the budget of the child; where empty, a decode step of 70 % of the parent's.
        machine: measured.
        out: the file, which must not exist.

    Returns:
        What was written.

    Raises:
        InputError: a file is there already, no data is given, or something in it cannot be used.
    """
    if out.exists():
        raise InputError(f"{out} is there already", hint="name another file with --out")
    given = {name: list(paths) for name, paths in sources.items() if paths}
    if not given:
        raise InputError("there is no data to train on", hint="give --corpus, or --chats and --problems, or all three")
    if "problems" in given and "chats" not in given:
        raise InputError(
            "problems are for a model that has learned to think from chats, and no chats are given",
            hint="give --chats too, or leave --problems out",
        )
    limits = limits or (DEFAULT_LIMITS if "corpus" in given else {})
    facts = look(parent, given, Limits.parse(limits, where="--limits"), machine)
    settings = [*_named(parent, facts, given, out), *all_settings(facts)]
    out.write_text(recipe_text(settings, machine), encoding="utf-8")
    check(load_recipe(out))
    return settings


def look(parent: Path, sources: Mapping[str, Sequence[Path]], limits: Limits, machine: Machine) -> Facts:
    """What the rules look at.

    Raises:
        InputError: the model or the data cannot be used, or the machine's speed could not be measured.
        MissingPackage: the libraries that read the data are not installed.
    """
    shape = check_checkpoint(parent)
    device = machine.gpu or machine.processor
    if device is None:
        raise MissingPackage(
            "the speed of this machine is not known: that needs torch", hint="pip install 'tessera[train]'"
        )
    return Facts(
        parent=shape,
        stored=stored_dtype(parent),
        context=int(read_config(parent).get("max_position_embeddings") or DEFAULT_CONTEXT),
        data=look_at_data(parent, sources),
        computer=Computer(device, max(1, machine.gpus if machine.gpu else 1)),
        gpus=machine.gpus if machine.gpu else 0,
        cores=machine.cores,
        memory_bytes=machine.memory_bytes or 0,
        limits=limits,
    )


def look_at_data(parent: Path, sources: Mapping[str, Sequence[Path]]) -> DataFacts:
    """Read the user's files as the data stage would.

    Raises:
        InputError: a file is not there, or a row is malformed.
        MissingPackage: the libraries that read them are not installed.
    """
    try:
        surveying: Any = importlib.import_module(SURVEY)
    except ModuleNotFoundError as error:
        raise MissingPackage(f"this needs {error.name}", hint="pip install 'tessera[train]'") from None
    with ExitStack() as folders:
        found: dict[str, Path | None] = dict.fromkeys(("corpus", "chats", "problems"))
        for name, paths in sources.items():
            texts, kind = [str(path) for path in paths], KINDS[f"own_{name}"]
            files = dict(files_of(f"own_{name}", texts, kind))
            found[name] = folders.enter_context(staged(files, kind, texts))
        facts: DataFacts = surveying.survey(parent, **found)
        return facts


def _named(parent: Path, facts: Facts, sources: Mapping[str, Sequence[Path]], out: Path) -> Iterator[Setting]:
    """Where model and data are, and what was seen of them."""
    parameters = facts.parent.parameters / 1e6
    yield Setting(
        "parent",
        _written(parent, out),
        f"{parameters:,.1f} M parameters in {len(facts.parent.blocks)} layers, stored in {facts.stored}, made for "
        f"{facts.context:,} tokens",
    )
    data = facts.data
    if data.corpus is not None:
        about = "about " if data.corpus.estimated else ""
        yield Setting("corpus", _paths(sources["corpus"], out), f"{about}{data.corpus.tokens:,} tokens")
    if data.chats is not None:
        thinking = f"{data.chats.num_chats:,} chats, {data.chats.num_thinking:,} of them with thinking"
        yield Setting("sft.data", _paths(sources["chats"], out), thinking)
    if data.problems is not None:
        yield Setting("rl.data", _paths(sources["problems"], out), f"{data.problems.num_problems:,} problems")


def _paths(paths: Sequence[Path], out: Path) -> JsonValue:
    written: list[JsonValue] = [_written(path, out) for path in paths]
    return written[0] if len(written) == 1 else written


def _written(path: Path, out: Path) -> str:
    """A path relative to the recipe where it is below its folder, else absolute."""
    whole, folder = path.absolute(), out.absolute().parent
    return f"./{whole.relative_to(folder).as_posix()}" if whole.is_relative_to(folder) else str(whole)


def recipe_text(settings: Sequence[Setting], machine: Machine) -> str:
    """The recipe's YAML: a comment above each value says why it is what it is."""
    tree: dict[str, Any] = {}
    for setting in settings:
        *above, key = setting.key.split(".")
        place = tree
        for part in above:
            place = place.setdefault(part, {})
        place[key] = setting
    device = machine.gpu or machine.processor
    lines = [
        *_comment(
            "Written by `tessera init`: each value has its reason above it, and is yours to change. `tessera plan` "
            f"says what a run will take. Chosen for {device.name if device else 'this machine'}, {machine.gpus} GPUs"
            + (f": {speed_in_words(device)}." if device else "."),
            "",
        )
    ]
    if machine.busy_warning:
        lines += _comment(f"Warning: {machine.busy_warning}.", "")
    for section in SECTIONS:
        if section in tree:
            lines += ["", *_lines(section, tree[section], "")]
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any, indent: str) -> Iterator[str]:
    """A value with its comment, or a section with its values."""
    if isinstance(value, Setting):
        yield from _comment(value.reason, indent)
        yield f"{indent}{key}: {_yaml(value.value)}"
        return
    yield f"{indent}{key}:"
    for name, inner in value.items():
        yield from _lines(name, inner, indent + "  ")


def _comment(text: str, indent: str) -> list[str]:
    mark = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=mark, subsequent_indent=mark, break_on_hyphens=False)


def _yaml(value: JsonValue) -> str:
    """A value in YAML: JSON, but for small numbers, which YAML reads as texts without a point."""
    if isinstance(value, float) and 0 < value < 1e-3:
        return f"{value:.1e}"
    return json.dumps(value, ensure_ascii=False)
