"""What the stages before the search have made; the work of one that has not run is done here, for all layers."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from components.core.runtime.context import StageContext
from components.core.runtime.resume import Resume
from components.search.config import CostsConfig, ImportanceConfig, LibraryConfig, ScoresConfig, SearchConfig
from components.search.scoring.score_table import SCORES_FILE, BlockScore, ShardScores
from components.search.space.library_table import LIBRARY_FILE, ShardLibrary
from components.search.stages.costs_step import costs as measure_costs
from components.search.stages.library_step import importance as score_channels
from components.search.stages.library_step import library as train_library
from components.search.stages.scores_step import score_blocks


class SearchInputs(TypedDict):
    """Folders that the search reads, by the names that its declaration gives them."""

    parent: Path
    corpus: Path
    importance: NotRequired[Path | None]
    libraries: NotRequired[Sequence[Path] | None]
    scores: NotRequired[Sequence[Path] | None]
    costs: NotRequired[Path | None]
    problems: NotRequired[Path | None]
    earlier: NotRequired[Path | None]


@dataclasses.dataclass(frozen=True)
class UpstreamOutputs:
    """Folders of all shards.

    Attributes:
        importance: contribution of every FFN channel.
        libraries: trained sub-blocks.
        scores: their scores.
    """

    importance: Path
    libraries: Sequence[Path]
    scores: Sequence[Path]


def costs_folder(config: SearchConfig, inputs: SearchInputs, context: StageContext) -> Path:
    """The folder with `costs.json`: the input, or measured here."""
    if (given := inputs.get("costs")) is not None:
        return given
    here = context.scratch / "search"
    measure_costs(config.part(CostsConfig), context=context, out=here, parent=inputs["parent"])
    return here / "costs"


def run_missing_upstream(config: SearchConfig, inputs: SearchInputs, context: StageContext) -> UpstreamOutputs:
    """Importance, libraries and scores: the inputs, and what is missing among them made in one shard."""
    here, parent, corpus = context.scratch / "search", inputs["parent"], inputs["corpus"]
    importance, libraries, scores = inputs.get("importance"), inputs.get("libraries"), inputs.get("scores")
    if importance is None:
        score_channels(config.part(ImportanceConfig), context=context, out=here, parent=parent, corpus=corpus)
        importance = here / "importance"
    if not libraries:
        train_library(
            config.part(LibraryConfig),
            context=context,
            out=here,
            parent=parent,
            corpus=corpus,
            importance=importance,
            earlier=inputs.get("earlier"),
        )
        libraries = [here / "library"]
    if not scores:
        # A folder of its own for resume points: the library looks its own up by their step number alone.
        points = Resume(context.resume.folder / "scores", context.resume.interval_s)
        score_blocks(
            config.part(ScoresConfig),
            libraries,
            context=dataclasses.replace(context, resume=points),
            out=here,
            parent=parent,
            corpus=corpus,
            problems=inputs.get("problems"),
        )
        scores = [here / "scores"]
    return UpstreamOutputs(importance, libraries, scores)


def read_scores(upstream: UpstreamOutputs) -> list[ShardScores]:
    """The scores of all shards, joined with the training errors from the libraries."""
    trained = {
        (block.layer, block.part, block.size): block
        for folder in upstream.libraries
        for block in ShardLibrary.model_validate_json((folder / LIBRARY_FILE).read_bytes()).blocks
    }

    def with_errors(block: BlockScore) -> BlockScore:
        known = trained.get((block.layer, block.part, block.size))
        return block.model_copy(update=known.model_dump()) if known else block

    shards = [ShardScores.model_validate_json((folder / SCORES_FILE).read_bytes()) for folder in upstream.scores]
    return [shard.model_copy(update={"blocks": tuple(map(with_errors, shard.blocks))}) for shard in shards]
