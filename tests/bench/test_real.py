"""The short form of `make real`: a recipe of `tessera init` takes a tiny model and its data through all stages."""

from pathlib import Path

import pytest

from components.core.store.store import open_store
from pipelines.records.runs import run_record
from tests.bench.real import RUN, perplexities, rows_of_run, run_whole

pytestmark = pytest.mark.real


def test_a_recipe_of_init_goes_from_the_data_to_a_bundle(tmp_path: Path) -> None:
    run_whole(tmp_path, quick=True)
    assert run_record(open_store(tmp_path / "store"), RUN)["status"] == "succeeded"
    rows = {row.name: row for row in [*rows_of_run(tmp_path), *perplexities(tmp_path)]}
    assert rows["minutes"].value > 0
    assert rows["memory"].value > 0
    assert 0 < rows["disk_ratio"].value <= 0.75
    for name in ("format_on", "format_off"):
        assert 0 <= rows[name].value <= 1
    assert -1 <= rows["rl_gain"].value <= 1
    for name in ("perplexity_docs_128", "perplexity_docs_512", "perplexity_other_512"):
        assert rows[name].ratio == pytest.approx(1, abs=0.2)  # the child is like its parent, which knows nothing
