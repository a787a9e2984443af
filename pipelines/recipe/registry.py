"""The declaration of every stage by name."""

from collections.abc import Mapping

from components.core.base.errors import InputError
from components.core.base.suggestions import nearest
from components.core.runtime.stage import Stage
from components.core.runtime.stage_command import load_declaration
from components.core.store.manifest import Kind

STAGES: Mapping[str, str] = {
    **{
        name: f"components.{name}.config:STAGE"
        for name in ("data", "pretrain", "distill", "sft", "rl", "eval", "deploy")
    },
    "search-importance": "components.search.declarations:IMPORTANCE",
    "search-costs": "components.search.declarations:COSTS",
    "search-library": "components.search.declarations:LIBRARY",
    "search-scores": "components.search.declarations:SCORES",
    "search": "components.search.declarations:SEARCH",
}
"""Where each stage is declared: `module:name`."""

CORE_IMAGE = "core"
"""The image without torch: it ends runs and serves MLflow."""
STAGE_IMAGES: Mapping[str, str] = {
    **dict.fromkeys(("data", "pretrain", "distill", "sft"), "train"),
    **dict.fromkeys(("search", "rl", "eval", "deploy"), "serve"),
}
"""The image that runs the stages of each folder below `components`; `serve` is `train` with vLLM."""


def find_stage(name: str) -> Stage:
    """The declaration of a stage.

    Raises:
        InputError: no stage has this name.
    """
    if name not in STAGES:
        raise InputError(f"no stage {name!r}", hint=nearest(name, list(STAGES)))
    return load_declaration(STAGES[name])


def stage_folder(name: str) -> str:
    """The folder below `components` that holds a stage."""
    return STAGES[name].split(".")[1]


def stage_image(name: str) -> str:
    """The name of the image that runs a stage, without registry and version."""
    return STAGE_IMAGES[stage_folder(name)]


def output_kinds() -> dict[str, dict[str, Kind]]:
    """Kind of each output of each stage."""
    stages = map(find_stage, STAGES)
    return {stage.name: {name: output.kind for name, output in stage.outputs.items()} for stage in stages}
