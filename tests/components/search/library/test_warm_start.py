"""A library that begins with an earlier one: of the same parent, and of the parent of a distilled child."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from components.core.base.errors import InputError
from components.core.model.checkpoint import load_model, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import quiet_context
from components.search.config import Distillation, ImportanceConfig, LibraryConfig, Limits
from components.search.library.warm_start import digest_of_weights, layers_before
from components.search.search_table import TABLE_FILE, SearchTable
from components.search.space.library_table import ShardLibrary
from components.search.space.subblocks import heterogeneous_model, keep_channels, subblock_weights
from components.search.stages.library_step import importance, library
from components.search.stages.search_step import search
from tests.components.search.stages.test_search_step import CONFIG as SEARCHED
from tests.components.search.stages.test_search_step import write_costs

CONFIG = LibraryConfig(
    ffn_fractions=(1.0, 0.5), seq_len=32, batch_size=4, distillation=Distillation(num_steps=12), seed=1
)
KEPT = (0, 2, 3)
"""Layers of the parent that the child has."""


def make_library(config: LibraryConfig, folder: Path, parent: Path, corpus: Path, earlier: Path | None = None) -> Path:
    """The library of a parent; returns its folder."""
    context = quiet_context(folder / "job")
    watched = ImportanceConfig(seq_len=32, batch_size=4, importance_batches=1, seed=1)
    importance(watched, context=context, out=folder, parent=parent, corpus=corpus)
    channels = folder / "importance"
    library(config, context=context, out=folder, parent=parent, corpus=corpus, importance=channels, earlier=earlier)
    return folder / "library"


def told(folder: Path) -> ShardLibrary:
    return ShardLibrary.model_validate_json((folder / "library.json").read_bytes())


def weights(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, parent_folder: Path, corpus: Path) -> Path:
    return make_library(CONFIG, tmp_path_factory.mktemp("first"), parent_folder, corpus)


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory, parent_folder: Path) -> Path:
    """What distillation could leave of a child without layer 1: all weights near the parent's, none equal."""
    parent, folder = load_model(parent_folder), tmp_path_factory.mktemp("child")
    model = heterogeneous_model(parent.config, ((4, 64), (4, 64), (4, 32)))
    for new, old in enumerate(KEPT):
        state = parent.model.layers[old].state_dict()
        ffn = keep_channels(subblock_weights(state, "ffn"), torch.arange(32)) if new == 2 else {}
        model.model.layers[new].load_state_dict({**state, **ffn})
    for name in ("embed_tokens", "norm"):
        getattr(model.model, name).load_state_dict(getattr(parent.model, name).state_dict())
    model.lm_head.load_state_dict(parent.lm_head.state_dict())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.01 * torch.randn(parameter.shape, generator=generator))
    model.config.parent_layers = [2, 3, 4]
    save_model(model, folder, tokenizer=parent_folder)
    return folder


def test_layers_are_found_by_how_many_are_behind_them() -> None:
    assert layers_before([1, 3, 4], depth=3, depth_before=4) == {0: 0, 1: 1, 2: 3}
    assert layers_before([2, 3, 4], depth=3, depth_before=4) == {0: 0, 1: 2, 2: 3}
    assert layers_before([1, 3, 4], depth=3, depth_before=3) == {0: 0, 1: 1, 2: 2}
    assert layers_before([1, 3, 4], depth=3, depth_before=5) == {}
    assert layers_before(None, depth=3, depth_before=4) == {}


def test_digests_tell_weights_apart_by_value_name_and_precision() -> None:
    own = {"a": torch.tensor([1.0, 2.0]), "b": torch.zeros(2, 2)}
    others = [
        {**own, "a": torch.tensor([1.0, 2.0000002])},
        {"a": own["a"], "c": own["b"]},
        {**own, "a": own["a"].bfloat16()},
        {**own, "b": torch.zeros(4)},
    ]
    digests = {digest_of_weights(one) for one in (own, *others)}
    assert len(digests) == 5
    assert digest_of_weights({name: tensor.clone() for name, tensor in reversed(own.items())}) in digests


def test_a_variant_of_the_same_parent_is_reused_as_it_is(
    first: Path, tmp_path: Path, parent_folder: Path, corpus: Path
) -> None:
    wider = CONFIG.model_copy(update={"ffn_fractions": (1.0, 0.5, 0.25)})
    again = make_library(wider, tmp_path, parent_folder, corpus, first)
    blocks = told(again).blocks
    assert {block.size for block in blocks if block.start != "reused"} == {16}
    assert {block.start for block in blocks if block.size == 16} == {"parent"}
    assert {
        name: found for name, found in weights(again).items() if not name.endswith("ffn-16.safetensors")
    } == weights(first)
    alone = make_library(wider, tmp_path / "alone", parent_folder, corpus)
    assert weights(again) == weights(alone)


def test_training_for_longer_goes_on_from_the_earlier_library(
    first: Path, tmp_path: Path, parent_folder: Path, corpus: Path
) -> None:
    longer = CONFIG.model_copy(update={"distillation": Distillation(num_steps=13)})
    again = told(make_library(longer, tmp_path, parent_folder, corpus, first))
    before = {(block.layer, block.part, block.size): block for block in told(first).blocks}
    assert {block.start for block in again.blocks} == {"earlier"}
    for block in again.blocks:
        first_error = before[block.layer, block.part, block.size].first_error
        assert block.first_error is not None
        assert first_error is not None
        assert block.first_error < first_error


def test_a_distilled_childs_variants_begin_where_they_err_less(
    first: Path, child: Path, tmp_path: Path, corpus: Path
) -> None:
    alone = told(make_library(CONFIG, tmp_path / "alone", child, corpus))
    again = told(make_library(CONFIG, tmp_path / "again", child, corpus, first))
    starts = [block.start for block in again.blocks]
    assert starts.count("earlier") > len(starts) / 2
    assert "reused" not in starts
    for block, other in zip(again.blocks, alone.blocks, strict=True):
        assert block.first_error is not None
        assert other.first_error is not None
        assert (block.first_error < other.first_error) == (block.start == "earlier")
        assert block.start == "earlier" or block.first_error == other.first_error


def test_a_child_is_searched_again(tmp_path: Path, parent_folder: Path, corpus: Path) -> None:
    """The child has other blocks in each layer, and layers that hold several of its parent's."""
    once, again = tmp_path / "once", tmp_path / "again"
    settings = {"ffn_fractions": (), "intermediate_sizes": (32, 16), "limits": Limits(latency_ms="50%")}
    config = SEARCHED.model_copy(update=settings)
    for folder, parent in ((once, parent_folder), (again, once / "child")):
        folder.mkdir()
        given = write_costs(folder, parent, config)
        search(config, context=quiet_context(folder), out=folder, parent=parent, corpus=corpus, costs=given)
    first, second, third = (load_model(path) for path in (parent_folder, once / "child", again / "child"))
    assert third.num_parameters() < second.num_parameters() < first.num_parameters()
    earlier = make_library(CONFIG, tmp_path / "first", parent_folder, corpus)
    layers = layers_before(second.config.parent_layers, second.config.num_hidden_layers, 4)
    offered = CONFIG.model_copy(update={"ffn_fractions": (), "intermediate_sizes": (32, 16)})
    blocks = told(make_library(offered, tmp_path / "second", once / "child", corpus, earlier)).blocks
    known = {(block.layer, block.part, block.size) for block in told(earlier).blocks}
    for block in blocks:  # what the child took from its parent as it was is still taught by the same weights
        own = subblock_weights(second.model.layers[block.layer].state_dict(), block.part)
        before = subblock_weights(first.model.layers[layers[block.layer]].state_dict(), block.part)
        same = own.keys() == before.keys() and all(torch.equal(own[name], before[name]) for name in own)
        assert (block.start == "reused") == (same and (layers[block.layer], block.part, block.size) in known)
    assert {block.start for block in blocks} >= {"reused", "parent"}


def test_a_whole_search_takes_an_earlier_library_too(
    first: Path, tmp_path: Path, parent_folder: Path, corpus: Path
) -> None:
    config = SEARCHED.model_copy(update={"distillation": CONFIG.distillation})
    given = write_costs(tmp_path, parent_folder, config)
    search(
        config,
        context=quiet_context(tmp_path),
        out=tmp_path,
        parent=parent_folder,
        corpus=corpus,
        costs=given,
        earlier=first,
    )
    table = SearchTable.model_validate_json((tmp_path / "search_table" / TABLE_FILE).read_text())
    known = {(block.layer, block.part, block.size) for block in told(first).blocks}
    assert known
    for block in table.blocks:
        assert (block.start == "reused") == ((block.layer, block.part, block.size) in known)


def test_what_begins_well_enough_is_not_trained(first: Path, child: Path, tmp_path: Path, corpus: Path) -> None:
    plain = told(make_library(CONFIG, tmp_path / "plain", child, corpus, first))
    error = min(block.first_error or 1.0 for block in plain.blocks if block.start == "earlier")
    settings = CONFIG.distillation.model_copy(update={"skip_below_error": 1.0001 * error})
    config = CONFIG.model_copy(update={"distillation": settings})
    folder = make_library(config, tmp_path / "again", child, corpus, first)
    settled = [block for block in told(folder).blocks if block.steps == 1]
    assert [block.first_error for block in settled] == [error]
    name = f"{settled[0].part}-{settled[0].size}.safetensors"
    found = load_file(folder / f"layer-{settled[0].layer}" / name)
    before = load_file(first / f"layer-{KEPT[settled[0].layer]}" / name)
    assert [tensor.tolist() for tensor in found.values()] == [tensor.tolist() for tensor in before.values()]


def test_a_folder_without_a_library_is_refused(parent_folder: Path, tmp_path: Path, corpus: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no library\.json"):
        make_library(CONFIG, tmp_path, parent_folder, corpus, tmp_path / "empty")


def test_variants_of_other_shapes_begin_from_the_parent(
    first: Path, parent: TesseraForCausalLM, parent_folder: Path, tmp_path: Path, corpus: Path
) -> None:
    """A child whose FFN has 32 channels is offered 16; the earlier library knows 32 alone."""
    model = heterogeneous_model(parent.config, ((4, 32),) * 4)
    save_model(model, tmp_path / "narrow", tokenizer=parent_folder)
    again = told(make_library(CONFIG, tmp_path / "again", tmp_path / "narrow", corpus, first))
    ffns = [block for block in again.blocks if block.part == "ffn"]
    assert {block.size for block in ffns} == {16}
    assert {block.start for block in ffns} == {"parent"}
