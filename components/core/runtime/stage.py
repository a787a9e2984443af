"""The stage contract: what a stage declares. `components.core.runtime.runner` does the rest once for all stages."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from components.core.base.config import Config
from components.core.store.manifest import Kind


@dataclass(frozen=True)
class Input:
    """An artifact that a stage reads."""

    kind: Kind
    doc: str
    optional: bool = False
    many: bool = False
    """Whether the stage takes a list, such as the outputs of a fan-out."""


@dataclass(frozen=True)
class Output:
    """An artifact that a stage makes."""

    kind: Kind
    doc: str


MeasuresTime = Callable[[Any, Mapping[str, object]], bool]
"""Function from a stage's checked configuration and its inputs to whether its result has measured times."""


def never_measures(config: Any, inputs: Mapping[str, object]) -> bool:
    """Of a stage whose result is the same on every machine."""
    return False


def always_measures(config: Any, inputs: Mapping[str, object]) -> bool:
    """Of a stage whose result has measured times, whatever its configuration."""
    return True


@dataclass(frozen=True)
class Stage:
    """A stage as the platform sees it; light, so that a recipe is checked and compiled without torch.

    Attributes:
        name: the name of the stage on the command line.
        config: its configuration class.
        inputs: the artifacts that it reads, by name.
        outputs: the artifacts that it makes, by name.
        entry: `module:function` of `run(config, *, context, out, **inputs) -> dict`. Each input is a local folder
            (`Path`), `None` if it is optional and absent, or `list[Path]` if `many`. `run` fills the folder
            `out / <name>` of each output and returns a small JSON object, the `result` of the stage's record.
        doc: purpose, one sentence.
        source: paper and section.
        measures_time: whether times are part of its result; they are reused only on the same kind of device.
    """

    name: str
    config: type[Config]
    inputs: Mapping[str, Input]
    outputs: Mapping[str, Output]
    entry: str
    doc: str
    source: str
    measures_time: MeasuresTime = never_measures


def item_label(label: str, index: int | str) -> str:
    """The role of one item of a fan-out: `search/library` becomes `search/library-0`."""
    return f"{label}-{index}"
