"""The stage contract: what a stage declares. `components.core.runtime.runner` does the rest once for all stages."""

from collections.abc import Mapping
from dataclasses import dataclass

from components.core.base.config import Config
from components.core.store.manifest import Kind


@dataclass(frozen=True)
class Input:
    """An artifact that a stage reads."""

    kind: Kind
    doc: str
    optional: bool = False
    many: bool = False
    """Whether the stage takes a list: what a fan-out collected."""


@dataclass(frozen=True)
class Output:
    """An artifact that a stage makes."""

    kind: Kind
    doc: str


@dataclass(frozen=True)
class Stage:
    """A stage as the platform sees it; light, so that a recipe is checked and compiled without torch.

    Attributes:
        name: the name of the stage on the command line.
        config: its configuration class.
        inputs: what it reads, by name.
        outputs: what it makes, by name.
        entry: `module:function` of `run(config, *, context, out, **inputs) -> dict`. Each input arrives as a local
        folder (`Path`), as
            `None` where an optional one is absent, as `list[Path]` where `many`. `run` fills the folder `out /
            <name>` for each output and returns small JSON facts about the result (the `result` of the stage's record).
        doc: purpose, one sentence.
        source: paper and section.
    """

    name: str
    config: type[Config]
    inputs: Mapping[str, Input]
    outputs: Mapping[str, Output]
    entry: str
    doc: str
    source: str


def item_label(label: str, index: int | str) -> str:
    """The role of one item of a fan-out: `search/library` becomes `search/library-0`."""
    return f"{label}-{index}"
