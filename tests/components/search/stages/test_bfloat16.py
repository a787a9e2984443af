"""A parent in bfloat16: its weights stay that small, and what is computed with them is what float32 would compute."""

import json
from pathlib import Path

import pytest
import torch

from components.core.model.checkpoint import load_model, read_weights, save_model
from components.core.model.inspection import read_config
from components.core.runtime.context import StageContext, quiet_context
from components.core.text.packing import Batch
from components.search.library.calibration import observe
from components.search.space.layer_space import Variant
from components.search.space.subblocks import build_subblock, initialise, subblock_weights
from components.search.stages.search_step import search
from tests.components.search.stages.test_search_step import CONFIG, write_costs


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory, parent_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16") / "parent"
    model = load_model(parent_folder)
    model.to(torch.bfloat16)
    save_model(model, folder, tokenizer=parent_folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_search_keeps_its_parents_precision(tmp_path: Path, small_folder: Path, corpus: Path, dtype: str) -> None:
    config = CONFIG.model_copy(update={"dtype": dtype})
    (tmp_path / "costs").mkdir()
    costs = write_costs(tmp_path / "costs", small_folder, config)
    search(config, context=quiet_context(tmp_path), out=tmp_path, parent=small_folder, corpus=corpus, costs=costs)
    for name in ("child", "random_child", "greedy_child"):
        dtypes = {tensor.dtype for _, tensor in read_weights(tmp_path / name)}
        assert dtypes == {torch.bfloat16}
        assert read_config(tmp_path / name)["dtype"] == "bfloat16"
    table = json.loads((tmp_path / "search_table" / "search.json").read_text())
    assert all(0 <= block["kl"] < 100 for block in table["blocks"])


def test_the_parent_is_seen_as_in_float32(small_folder: Path, batches: list[Batch]) -> None:
    small, large = load_model(small_folder, dtype=None, computes_in=torch.float32), load_model(small_folder)
    with torch.no_grad():
        (seen, last), (expected, expected_last) = (observe(model, batches[0], [1, 3]) for model in (small, large))
    torch.testing.assert_close(last, expected_last, atol=1e-5, rtol=1e-5)
    for key, lesson in seen.items():
        torch.testing.assert_close(lesson.output_BTD, expected[key].output_BTD, atol=1e-5, rtol=1e-5)


def test_variants_are_trained_in_float32_and_given_away_as_they_came(small_folder: Path, context: StageContext) -> None:
    parent = load_model(small_folder, dtype=None, computes_in=torch.float32)
    own = subblock_weights(parent.model.layers[1].state_dict(), "attention")
    weights = initialise(own, Variant("attention", 2), importance_I=None, head_dim=32)
    student = build_subblock(parent, 1, Variant("attention", 2), weights)
    assert {parameter.dtype for parameter in student.parameters()} == {torch.float32}
    given = student.weights()
    assert all(torch.equal(given[name], tensor) for name, tensor in weights.items())
    assert {tensor.dtype for tensor in given.values()} == {torch.bfloat16}
