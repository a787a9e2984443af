"""Model folders as people have them, from the names of their files."""

from pathlib import Path

import pytest

from components.core.base.errors import CheckpointError
from components.core.model.inspection import INDEX, weight_files
from pipelines.recipe.source_files import files_of


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


@pytest.mark.parametrize("other", ["._model.safetensors", "consolidated.safetensors", "adapter_model.safetensors"])
def test_files_beside_the_model_are_not_read(tmp_path, other):
    assert weight_files(write(tmp_path, "model.safetensors", other)) == [tmp_path / "model.safetensors"]


def test_two_models_in_one_folder_are_refused(tmp_path):
    write(tmp_path, "model.safetensors", "model-00001-of-00001.safetensors")
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"two models: model\.safetensors, and 1 files .*model-00001-of-00001"):
        weight_files(tmp_path)


def test_an_adapter_alone_is_to_be_merged_first(tmp_path):
    with pytest.raises(CheckpointError, match="merge it first"):
        weight_files(write(tmp_path, "adapter_model.safetensors", "adapter_config.json"))


def test_parquet_reaches_the_data_stage_and_other_binary_files_are_named(tmp_path, caplog):
    (tmp_path / "a.parquet").write_bytes(b"PAR1\0")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\0")
    assert [name for name, _ in files_of("own_corpus", [str(tmp_path)], "data")] == ["a.parquet"]
    assert "1 binary files are left out, such as b.png" in caplog.text
