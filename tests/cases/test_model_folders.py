"""Model folders as people have them; what transformers reads of them is what we read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from components.core.base.errors import CheckpointError
from components.core.model.checkpoint import load_model, read_weights, save_model
from components.core.model.inspection import check_checkpoint, checkpoint_notes, read_architecture
from components.core.model.weight_index import EMBEDDING, HEAD, INDEX, SINGLE_FILE, weight_files
from components.core.store.store import Store, open_store
from pipelines.recipe.source_files import files_of
from pipelines.run.ingest import ingest, source_digest
from tests.components.core import tiny_models
from tests.components.core.dense_models import dense_model


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


IDS = torch.tensor([[5, 6, 7, 8]])


def dense_folder(folder: Path, family: str = "llama", **changes: object) -> Path:
    """A dense model and a tokenizer."""
    dense_model(family, **changes).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


def add(folder: Path, **tensors: Tensor) -> None:
    weights = load_file(folder / SINGLE_FILE)
    save_file(weights | {name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / SINGLE_FILE)


def logits(folder: Path) -> tuple[Tensor, Tensor]:
    """Ours, and those of transformers."""
    check_checkpoint(folder)
    with torch.no_grad():
        return load_model(folder)(IDS).logits, AutoModelForCausalLM.from_pretrained(folder).float()(IDS).logits


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"))


def stored(store: Store, folder: Path) -> Path:
    """The folder as an artifact; a plan finds the digest that a run gives it."""
    digest = ingest(store, "parent", [str(folder)], "model")
    assert source_digest(store, "parent", [str(folder)], "model") == digest
    return store.fetch(digest)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_stored_head_that_differs_from_a_tied_embedding_is_used(tmp_path, store, caplog, family):
    folder = dense_folder(tmp_path / "parent", family, tie_word_embeddings=True)
    add(folder, lm_head__weight=torch.randn(61, 48))
    assert "the stored head is used" in checkpoint_notes(folder)[0]
    torch.testing.assert_close(*logits(folder))
    for paged in (False, True):
        model = load_model(folder, paged=paged)
        save_model(model, tmp_path / f"child-{paged}", tokenizer=folder, by_block=paged)
        for written in (tmp_path / f"child-{paged}", stored(store, tmp_path / f"child-{paged}")):
            assert json.loads((written / "config.json").read_text())["tie_word_embeddings"] is False
            torch.testing.assert_close(load_model(written)(IDS).logits, logits(folder)[1])
    caplog.clear()
    artifact = stored(store, folder)
    assert "parent: config.json says tie_word_embeddings: true" in caplog.text
    assert json.loads((artifact / "config.json").read_text())["tie_word_embeddings"] is False
    assert checkpoint_notes(artifact) == []


def test_a_stored_head_that_equals_the_embedding_stays_tied(tmp_path):
    folder = dense_folder(tmp_path / "parent", tie_word_embeddings=True)
    embedding = load_file(folder / SINGLE_FILE)[EMBEDDING]
    add(folder, lm_head__weight=embedding.clone())
    assert checkpoint_notes(folder) == []
    assert read_architecture(folder).tie_word_embeddings
    torch.testing.assert_close(*logits(folder))
    add(folder, lm_head__weight=embedding + torch.eye(61, 48))  # the file has changed since it was compared
    assert not read_architecture(folder).tie_word_embeddings


def test_a_head_in_another_shard_than_the_embedding_is_found(tmp_path):
    folder = dense_folder(tmp_path / "parent", tie_word_embeddings=True)
    weights = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    files = {name: "model-00001-of-00002.safetensors" for name in weights} | {HEAD: "model-00002-of-00002.safetensors"}
    save_file(weights, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    save_file({HEAD: torch.randn(61, 48)}, folder / "model-00002-of-00002.safetensors", {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    torch.testing.assert_close(*logits(folder))


def test_counters_and_masks_are_left_out_and_named(tmp_path, store):
    folder = dense_folder(tmp_path / "parent")
    counter, mask = torch.ones(3, dtype=torch.int64), torch.ones(2, 2, dtype=torch.bool)
    add(folder, model__layers__0__self_attn__counter=counter, model__mask=mask)
    (note,) = checkpoint_notes(folder)
    assert "left out: 2 tensors that are no weights of the model, such as model." in note
    torch.testing.assert_close(*logits(folder))
    torch.testing.assert_close(load_model(folder, paged=True)(IDS).logits, logits(folder)[1])
    artifact = stored(store, folder)
    expected = {name: value for name, value in load_file(folder / SINGLE_FILE).items() if value.is_floating_point()}
    found = load_file(artifact / SINGLE_FILE)
    assert found.keys() == expected.keys() == dict(read_weights(folder)).keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_stale_index_beside_a_whole_model_is_left_out(tmp_path, store):
    folder = dense_folder(tmp_path / "parent")
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: "model-00002-of-00002.safetensors"}}))
    assert "such as model-00002-of-00002.safetensors; model.safetensors is read" in checkpoint_notes(folder)[0]
    torch.testing.assert_close(*logits(folder))
    assert not (stored(store, folder) / INDEX).exists()  # vLLM would look for its files


def test_other_weights_beside_a_model_stay_out_of_the_store(tmp_path, store):
    folder = dense_folder(tmp_path / "parent")
    write(folder, "consolidated.safetensors", "adapter_model.safetensors", "._model.safetensors")
    assert "3 other files of weights" in checkpoint_notes(folder)[0]
    assert [path.name for path in stored(store, folder).glob("*.safetensors")] == [SINGLE_FILE]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE_FILE])
def test_a_link_to_nothing_is_named_with_its_target(tmp_path, name):
    folder = dense_folder(tmp_path / "parent")
    (folder / name).unlink()
    (folder / name).symlink_to("../blobs/abc")
    with pytest.raises(CheckpointError, match=rf"{name} is a link to \.\./blobs/abc, which is not there"):
        check_checkpoint(folder)


def test_links_into_a_cache_are_followed(tmp_path, store):
    folder = dense_folder(tmp_path / "parent")
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(f"../blobs/{number}")
    torch.testing.assert_close(*logits(folder))
    assert not any(path.is_symlink() for path in stored(store, folder).iterdir())


def test_the_makers_own_format_is_named(tmp_path):
    folder = dense_folder(tmp_path / "parent")
    (folder / SINGLE_FILE).rename(folder / "consolidated.safetensors")
    with pytest.raises(CheckpointError, match="Mistral's original format"):
        check_checkpoint(folder)
    (folder / "config.json").rename(folder / "params.json")
    with pytest.raises(CheckpointError, match=r"original format of its makers \(params.json\)"):
        check_checkpoint(folder)


def test_a_weight_in_two_files_is_refused_with_both(tmp_path):
    folder = dense_folder(tmp_path / "parent")
    (folder / SINGLE_FILE).rename(folder / "a.safetensors")
    check_checkpoint(folder)
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")
    with pytest.raises(CheckpointError, match=r"is in a\.safetensors and in b\.safetensors"):
        check_checkpoint(folder)
