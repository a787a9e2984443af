"""How much text the scores of a search need: `python -m tests.bench.scored_text STORE RUN OUT`.

A finished search keeps the scores of every row of text. Here some of its rows choose a child within the limits of the
run, and the other rows judge it: by its total score there over that of the best child by their own scores. So the
best child of the others has an advantage, and the true loss is smaller.
"""

import argparse
import itertools
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from components.core.store.store import open_store
from components.search.config import Measure
from components.search.scoring.score_table import SCORES_FILE, ShardScores
from components.search.search_table import TABLE_FILE, SearchTable
from components.search.solver.option_table import OptionTable
from components.search.solver.solve import minimise
from pipelines.records.runs import artifact, stage_documents
from tests.bench.rows import Row, tell, write_rows

MAX_SAMPLES = 28
"""Ways to draw rows that are tried at most."""


class RowScores:
    """The scores of every option by any rows of text."""

    def __init__(self, table: OptionTable, shards: Sequence[ShardScores], measure: Measure) -> None:
        self._table, self.row_tokens = table, shards[0].row_tokens
        self._sums = {
            (block.layer, block.part, block.size): block.row_sums[measure] for shard in shards for block in shard.blocks
        }

    def by(self, rows: Sequence[int]) -> list[list[float]]:
        """Score of each option of each slot, nats a token; the parent's own is 0."""
        tokens = sum(self.row_tokens[row] for row in rows)

        def score(key: tuple[int, str, object]) -> float:
            return sum(self._sums[key][row] for row in rows) / tokens if key in self._sums else 0.0

        return [[score((slot.layer, slot.part, option.size)) for option in slot.options] for slot in self._table.slots]


def regrets(scores: RowScores, table: SearchTable, num_rows: int) -> Iterator[float]:
    """Score on the other rows of the child that some rows choose, over that of the best child there."""
    rows = range(len(scores.row_tokens))
    samples = list(itertools.combinations(rows, num_rows))
    for chosen in random.Random(0).sample(samples, min(MAX_SAMPLES, len(samples))):
        others = scores.by([row for row in rows if row not in chosen])
        totals = []
        for objective in (scores.by(chosen), others):
            found = minimise(table, objective, table.limits)
            assert found is not None, "the run itself has found a child within these limits"
            totals.append(sum(options[pick] for options, pick in zip(others, found.choice, strict=True)))
        yield totals[0] / totals[1]


def read_json(file: Path) -> Any:
    """What a file says."""
    return json.loads(file.read_text(encoding="utf-8"))


def main() -> None:
    """Try one row, two, four, and so on up to half of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.scored_text")
    parser.add_argument("store")
    parser.add_argument("run")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    store = open_store(options.store)
    table = SearchTable.parse(read_json(store.fetch(artifact(store, options.run, "search")) / TABLE_FILE))
    records = [
        store.stage_record(document["key"])
        for label, document in stage_documents(store, options.run).items()
        if label.startswith("search/scores")
    ]
    shards = [
        ShardScores.parse(read_json(store.fetch(each.outputs["scores"]) / SCORES_FILE)) for each in records if each
    ]
    measure = next(iter(shards[0].blocks[0].row_sums))
    scores, found, number = RowScores(table, shards, measure), [], 1
    while number <= len(scores.row_tokens) // 2:
        ratios = list(regrets(scores, table, number))
        tell(f"{number} rows: {statistics.median(ratios):.3f}")
        name = f"score by {sum(scores.row_tokens[:number]):,} tokens, over the best"
        worst = f"the largest of {len(ratios)}: {max(ratios):.3f}; {measure} of the other rows"
        found.append(Row(name, statistics.median(ratios), "ratio", worst))
        number *= 2
    write_rows(found, options.out)


if __name__ == "__main__":
    main()
