"""What the stages before the search have made; where one has not run, its work is done here."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from components.core.runtime.context import StageContext
from components.core.runtime.resume import Resume
from components.search.config import ImportanceConfig, LibraryConfig, ScoresConfig, SearchConfig
from components.search.library.records import LIBRARY_FILE, ShardLibrary
from components.search.scoring.records import SCORES_FILE, BlockScore, ShardScores
from components.search.stages.importance_step import importance as watch_channels
from components.search.stages.library_step import library as train_library
from components.search.stages.scores_step import score_blocks


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


def run_missing_upstream(
    config: SearchConfig,
    here: Path,
    context: StageContext,
    read: Mapping[str, Path | None],
    *,
    importance: Path | None,
    libraries: Sequence[Path] | None,
    scores: Sequence[Path] | None,
    earlier: Path | None = None,
) -> UpstreamOutputs:
    """What is given; the rest is made, for all layers in one shard.

    Args:
        config: of the whole search.
        here: takes what is made.
        context: takes progress, keeps resume points.
        read: inputs of these stages by their names: parent, corpus, costs, problems.
        importance: where it was made before.
        libraries: of all shards, where they were.
        scores: of all shards, where they were.
        earlier: library of an earlier search, for the one that is made.
    """
    watched: dict[str, Any] = {"context": context, "out": here, "parent": read["parent"], "corpus": read["corpus"]}
    if importance is None:
        watch_channels(config.part(ImportanceConfig), **watched)
        importance = here / "importance"
    if not libraries:
        train_library(config.part(LibraryConfig), importance=importance, earlier=earlier, **watched)
        libraries = [here / "library"]
    if not scores:
        # Points of their own: those of the library are found by their step alone.
        points = Resume(context.resume.folder / "scores", context.resume.interval_s)
        scoring: dict[str, Any] = {**read, "context": dataclasses.replace(context, resume=points), "out": here}
        score_blocks(config.part(ScoresConfig), libraries, **scoring)
        scores = [here / "scores"]
    return UpstreamOutputs(importance, libraries, scores)


def read_scores(before: UpstreamOutputs) -> list[ShardScores]:
    """The scores of all shards, with the training errors that the libraries tell."""
    trained = {
        (block.layer, block.part, block.size): block
        for folder in before.libraries
        for block in ShardLibrary.model_validate_json((folder / LIBRARY_FILE).read_bytes()).blocks
    }

    def with_errors(block: BlockScore) -> BlockScore:
        known = trained.get((block.layer, block.part, block.size))
        return block.model_copy(update=known.model_dump()) if known else block

    shards = [ShardScores.model_validate_json((folder / SCORES_FILE).read_bytes()) for folder in before.scores]
    return [shard.model_copy(update={"blocks": tuple(map(with_errors, shard.blocks))}) for shard in shards]
