"""The generated part of each stage's README: its settings, inputs and outputs, as the code declares them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel

from components.core.base.config import canonical_json
from components.core.runtime.stage import Input, Output, Stage
from pipelines.recipe.registry import STAGES, find_stage, stage_folder

ROOT = Path(__file__).parents[2]
BEGIN = "<!-- generated from the code: `make golden` renews what follows -->"
END = "<!-- end of what is generated -->"


def stages_by_folder() -> dict[str, list[Stage]]:
    """The stages that each folder below `components` declares, in order."""
    folders: dict[str, list[Stage]] = {}
    for name in STAGES:
        folders.setdefault(stage_folder(name), []).append(find_stage(name))
    return folders


def page_path(folder: str) -> Path:
    """Where the README of a stage's folder is."""
    return ROOT / "components" / folder / "README.md"


def renewed(page: str, stages: Sequence[Stage]) -> str:
    """A page with its generated part made anew, and all else as it was.

    Raises:
        ValueError: the page does not have both markers, once each and in order.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or page.count(BEGIN) + page.count(END) != 2:
        raise ValueError(f"a stage's page has {BEGIN!r} and then {END!r}, once each")
    generated = "\n\n".join(describe(stage) for stage in stages)
    return f"{before}{BEGIN}\n\n{generated}\n\n{END}{after}"


def describe(stage: Stage) -> str:
    """What a stage declares, as Markdown."""
    return "\n\n".join(
        [
            f"## `{stage.name}`",
            f"{_prose(stage.doc)} Source: {stage.source}.",
            _table(("Setting", "Default", "Meaning"), settings(stage.config)),
            _table(("Input", "Kind", "What it is"), _artifacts(stage.inputs)),
            _table(("Output", "Kind", "What it is"), _artifacts(stage.outputs)),
        ]
    )


def settings(config: type[BaseModel], of: BaseModel | None = None, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted name, default and meaning of every setting; a nested configuration is told by its own settings.

    Args:
        config: the configuration class.
        of: an instance whose values are the defaults, in place of the class's own.
        prefix: begins every name.
    """
    for name, field in config.model_fields.items():
        default = getattr(of, name) if of is not None else field.default
        if isinstance(default, BaseModel):
            yield from settings(type(default), default, f"{prefix}{name}.")
        else:
            required = of is None and field.is_required()
            yield f"`{prefix}{name}`", "required" if required else f"`{_plain(default)}`", field.description or ""


def _plain(value: object) -> str:
    """A default as a recipe would have it."""
    return str(value) if isinstance(value, float) else canonical_json(value)


def _artifacts(declared: Mapping[str, Input] | Mapping[str, Output]) -> Iterator[tuple[str, str, str]]:
    for name, artifact in declared.items():
        many = isinstance(artifact, Input) and artifact.many
        optional = isinstance(artifact, Input) and artifact.optional
        kind = f"{artifact.kind}{', several' if many else ''}{', optional' if optional else ''}"
        yield f"`{name}`", kind, artifact.doc


def _table(heading: Sequence[str], rows: Iterator[tuple[str, str, str]]) -> str:
    lines = [heading, ["---"] * len(heading), *([_prose(cell).replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _prose(text: str) -> str:
    """One line in which `<` opens no HTML tag, code spans left as they are."""
    parts = " ".join(text.split()).split("`")
    return "`".join(part if index % 2 else part.replace("<", "&lt;") for index, part in enumerate(parts))
