"""Calibration text where the corpus has not enough rows for what is asked for."""

from pathlib import Path

import pytest

from components.core.runtime.context import StageContext
from components.core.text.corpus.encoding import load_corpus
from components.search.config import Calibration
from components.search.library.calibration import calibration_batches
from tests.components.conftest import Recorder


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_split_with_too_few_rows_gives_fewer_batches_and_says_so(
    split: str, corpus: Path, parent_folder: Path, recorded_context: StageContext, recorder: Recorder
) -> None:
    config = Calibration(seq_len=32, batch_size=4)
    enough = calibration_batches(config, corpus, parent_folder, split, 1, recorded_context)
    assert ([len(batch.input_ids_BT) for batch in enough], recorder.notes) == ([4], [])

    batches = calibration_batches(config, corpus, parent_folder, split, 500, recorded_context)
    examples = load_corpus(corpus, parent_folder, split)
    assert sum(int((batch.segment_ids_BT > 0).sum()) for batch in batches) == sum(len(e.token_ids) for e in examples)
    rows = [row for batch in batches for row in batch.input_ids_BT]
    assert recorder.notes == [
        f"the {split} split has {len(rows)} packed rows of 32 tokens: they are {len(batches)} batches "
        "of at most 4 rows, where 500 full batches were asked for"
    ]
