"""The stages of the search end to end on a tiny parent, with costs that are given."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from components.core.base.errors import InfeasibleBudget, InputError, RecipeError
from components.core.model.checkpoint import load_model, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import Interrupted, StageContext, quiet_context
from components.core.serving.load_profile import LoadProfile
from components.search.config import (
    Candidates,
    CostsConfig,
    Distillation,
    Fusion,
    ImportanceConfig,
    LatencyFeedback,
    LibraryConfig,
    Limits,
    Measurement,
    ScoresConfig,
    SearchConfig,
    TaskSet,
)
from components.search.costs.measured import counted_costs
from components.search.costs.resources import Costs, CostTable, Machine
from components.search.refine.latency_feedback import MeasuredChild
from components.search.search_table import ChildRecord, SearchTable
from components.search.space.layer_space import Size, layer_spaces
from components.search.space.subblocks import heterogeneous_model, shape_of
from components.search.stages.costs_step import costs
from components.search.stages.library_step import importance, library
from components.search.stages.scores_step import scores
from components.search.stages.search_step import search

CONFIG = SearchConfig(
    ffn_fractions=(1.0, 0.5),
    seq_len=32,
    batch_size=4,
    importance_batches=1,
    scoring_batches=1,
    distillation=Distillation(num_steps=4),
    limits=Limits(latency_ms="50%", parameters="90%"),
    seed=1,
)


@pytest.fixture(scope="module")
def given_costs(tmp_path_factory: pytest.TempPathFactory, parent_folder: Path) -> Path:
    return write_costs(tmp_path_factory.mktemp("costs"), parent_folder, CONFIG)


def write_costs(folder: Path, parent_folder: Path, config: SearchConfig) -> Path:
    """Latency as if attention took a millisecond a KV head, and the FFN one for 32 channels."""
    model = load_model(parent_folder)
    fixed, variants = counted_costs(model, layer_spaces(config, shape_of(model.config)))
    table = CostTable(
        fixed=fixed.model_copy(update={"latency_ms": 1.0}),
        blocks={
            variant.name: costs.model_copy(
                update={"latency_ms": variant.count / (1 if variant.part == "attention" else 32)}
            )
            for variant, costs in variants.items()
        },
        machine=Machine(device="none", threads=1, versions={}),
        measurement=Measurement(),
        models=(),
    )
    (folder / "costs.json").write_text(table.model_dump_json())
    return folder


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, parent_folder: Path, corpus: Path, given_costs: Path) -> Path:
    """The outputs of the whole search, computed in place."""
    out = tmp_path_factory.mktemp("out")
    search(CONFIG, context=quiet_context(out), out=out, parent=parent_folder, corpus=corpus, costs=given_costs)
    return out


def test_the_child_is_what_the_table_says(searched: Path, parent_folder: Path) -> None:
    table = json.loads((searched / "search_table" / "search.json").read_text())
    for name in ("child", "random_child", "greedy_child"):
        model, chosen = load_model(searched / name), table[name]
        assert model.num_parameters() == chosen["parameters"] == chosen["costs"]["parameters"] - dropped_norms(chosen)
        assert len(model.model.layers) == len(chosen["fused_layers"])
        assert chosen["within_limits"]
        assert (searched / name / "tokenizer.json").read_bytes() == (parent_folder / "tokenizer.json").read_bytes()
    assert table["proof"]["gap"] == pytest.approx(0, abs=1e-9)
    assert table["child"]["score"] <= min(table["random_child"]["score"], table["greedy_child"]["score"]) + 1e-9
    assert table["child"]["costs"]["latency_ms"] <= table["limits"]["latency_ms"] * (1 + 1e-9)


def test_baselines_and_the_effect_of_fusion_are_told(searched: Path) -> None:
    table = SearchTable.model_validate_json((searched / "search_table" / "search.json").read_text())
    assert set(table.baselines) == {"most parameters", "uniform"}
    for name, other in table.baselines.items():
        assert other.within_limits, name
        assert other.score >= table.child.score - 1e-9, name
    most = table.baselines["most parameters"]
    assert most.costs.parameters >= max(table.child.costs.parameters, table.greedy_child.costs.parameters)
    assert table.fusion is not None
    assert table.fusion.kl_before > 0
    groups = [layer.parent_layers for layer in table.child.fused_layers if len(layer.parent_layers) > 1]
    assert [group for run in table.fusion.runs for group in run.groups] == groups
    assert table.fusion.timing is None


def test_several_candidates_are_tried_and_the_effect_of_fusion_is_timed(
    tmp_path: Path, parent_folder: Path, corpus: Path, given_costs: Path
) -> None:
    changes = {
        "distillation": Distillation(num_steps=0),
        # Room for one attention, which the first layer always has: the others are one run of FFNs.
        "num_key_value_heads": (4,),
        "no_op_ffn": False,
        "limits": Limits(latency_ms="45%"),
        "fusion": Fusion(keep_last=False, timing="decoder"),
        "candidates": Candidates(count=3, num_steps=3, batches=2),
    }
    config = CONFIG.model_copy(update=changes)
    search(
        config, context=quiet_context(tmp_path), out=tmp_path, parent=parent_folder, corpus=corpus, costs=given_costs
    )
    table = SearchTable.model_validate_json((tmp_path / "search_table" / "search.json").read_text())
    assert len(table.candidates) == 3
    assert [trial.score for trial in table.candidates] == sorted(trial.score for trial in table.candidates)
    assert [trial.choice for trial in table.candidates if trial.chosen] == [table.child.choice]
    assert table.certificate is not None
    assert table.certificate.choice == table.candidates[0].choice
    assert table.fusion is not None
    assert table.fusion.runs
    assert len(table.fusion.before_ms) == len(table.fusion.after_ms) > 0
    matrix = table.fusion.runs[0].dependency
    assert all(matrix[row][column] > 0 for row in range(len(matrix)) for column in range(row + 1, len(matrix)))


def dropped_norms(chosen: dict[str, list[object]]) -> int:
    """Values of the norms that fusion shares: one norm remains of each group."""
    fused = [layer["parent_layers"] for layer in chosen["fused_layers"]]  # type: ignore[index]
    return 128 * sum(len(group) - 1 for group in fused)


TRUE_MS = {4: 10.0, 2: 7.0, 1: 6.0, 0: 0.0}
"""Time of an attention by its KV heads: fewer of them save less than the first costs say."""


def true_ms(shape: Iterable[tuple[Size, Size]]) -> float:
    """Decode step of a model, milliseconds."""
    return 1.0 + sum(TRUE_MS[int(heads)] + int(width) / 32 for heads, width in shape)


def made_up_times(parent: Path, child: Path, load: LoadProfile, *_: object) -> MeasuredChild:
    """Times of the models in two folders on a machine that has become slower by a quarter."""

    def times(folder: Path) -> Costs:
        step_ms = 1.25 * true_ms(shape_of(load_model(folder).config))
        return Costs().timed(latency_ms=step_ms, time_to_first_token_ms=9.0, new_tokens=load.new_tokens)

    return MeasuredChild(times(parent), times(child), spread=0.01)


def test_children_are_measured_until_the_costs_are_right(
    tmp_path: Path, parent_folder: Path, corpus: Path, given_costs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.search.stages.search_step.measure_child", made_up_times)
    costs = json.loads((given_costs / "costs.json").read_text())
    for name, latency_ms in {"attention-4": 10.0, "attention-2": 5.0, "attention-1": 2.5}.items():
        costs["blocks"][name]["latency_ms"] = latency_ms
    (tmp_path / "costs").mkdir()
    (tmp_path / "costs" / "costs.json").write_text(json.dumps(costs))
    config = CONFIG.model_copy(
        update={"limits": Limits(latency_ms="70%"), "latency_feedback": LatencyFeedback(max_rounds=6)}
    )
    search(
        config,
        context=quiet_context(tmp_path),
        out=tmp_path,
        parent=parent_folder,
        corpus=corpus,
        costs=tmp_path / "costs",
    )
    table = SearchTable.model_validate_json((tmp_path / "search_table" / "search.json").read_bytes())
    first, *others = table.latency_feedback
    assert not first.agreed
    assert first.measured["latency_ms"] > first.predicted["latency_ms"]
    assert others[-1].agreed
    assert others[-1].choice == table.child.choice != first.choice
    for found in table.latency_feedback:
        sizes = [slot.options[pick].size for slot, pick in zip(table.slots, found.choice, strict=True)]
        assert found.measured["latency_ms"] == pytest.approx(true_ms(zip(sizes[::2], sizes[1::2], strict=True)))
        assert found.pace == pytest.approx(1.25)
    assert table.costs(table.parent_choice).latency_ms == pytest.approx(table.parent.latency_ms, 1e-3)
    assert table.child.costs.latency_ms <= table.limits["latency_ms"]


def test_the_steps_one_by_one_give_what_the_whole_gives(
    searched: Path, tmp_path: Path, parent_folder: Path, corpus: Path, given_costs: Path
) -> None:
    inputs = {"parent": parent_folder, "corpus": corpus}
    importance(CONFIG.part(ImportanceConfig), context=quiet_context(tmp_path / "i"), out=tmp_path, **inputs)
    costs(
        CONFIG.part(CostsConfig),
        context=quiet_context(tmp_path),
        out=tmp_path,
        parent=parent_folder,
        own_costs=given_costs,
    )
    shards = [tmp_path / "0", tmp_path / "1"]
    for number, shard in enumerate(shards):
        own, context = {"shard": f"{number}/2"}, quiet_context(shard)
        library(
            CONFIG.part(LibraryConfig, **own), context=context, out=shard, importance=tmp_path / "importance", **inputs
        )
        scores(CONFIG.part(ScoresConfig, **own), context=context, out=shard, library=shard / "library", **inputs)
    search(
        CONFIG,
        context=quiet_context(tmp_path / "s"),
        out=tmp_path,
        importance=tmp_path / "importance",
        costs=tmp_path / "costs",
        libraries=[shard / "library" for shard in shards],
        scores=[shard / "scores" for shard in shards],
        **inputs,
    )
    for folder in ("child", "greedy_child", "search_table"):
        files = {path.name: path.read_bytes() for path in (searched / folder).iterdir()}
        assert {path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} == files, folder


def test_sub_blocks_are_scored_on_problems(
    tmp_path: Path, parent_folder: Path, corpus: Path, given_costs: Path
) -> None:
    problems = tmp_path / "problems"
    problems.mkdir()
    rows = [{"id": str(a), "question": f"{a}+1=", "prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(6)]
    (problems / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CONFIG.model_copy(update={"score": "accuracy", "task": TaskSet(num_problems=6, max_tokens=3)})
    inputs: dict[str, Any] = {"parent": parent_folder, "corpus": corpus, "costs": given_costs}
    with pytest.raises(InputError, match="there are no problems"):
        search(config, context=quiet_context(tmp_path), out=tmp_path, **inputs)
    search(config, context=quiet_context(tmp_path), out=tmp_path, problems=problems, **inputs)
    table = SearchTable.model_validate_json((tmp_path / "search_table" / "search.json").read_bytes())
    assert all(block.accuracy is not None for block in table.blocks)
    scores_of = {(slot.layer, slot.part, option.size): option.score for slot in table.slots for option in slot.options}
    assert all(block.accuracy == scores_of[block.layer, block.part, block.size] for block in table.blocks)
    assert all(margin.error is not None for margin in table.margins if margin.following)


def test_children_share_the_bytes_of_what_they_share(searched: Path, parent: TesseraForCausalLM) -> None:
    """With each other, with the library and with a parent that is written alike: all but fused FFNs are theirs."""
    save_model(parent, searched / "parent-by-block", tokenizer=None, by_block=True)
    table = SearchTable.model_validate_json((searched / "search_table" / "search.json").read_text())
    written = {}
    for name in ("child", "random_child", "greedy_child"):
        chosen: ChildRecord = getattr(table, name)
        kept = {layer.parent_layers[0]: layer for layer in chosen.fused_layers if len(layer.parent_layers) == 1}
        fused = {layer.parent_layers[0] for layer in chosen.fused_layers} - kept.keys()
        assert kept
        of_layers = {int(file.name.split("-")[1]) for file in (searched / name).glob("layer-*")}
        assert of_layers == kept.keys() | fused
        for number, layer in kept.items():
            for part, size in (("attention", layer.num_key_value_heads), ("ffn", layer.intermediate_size)):
                file = f"layer-{number}-{part}.safetensors"
                assert (searched / name / file).is_file() == (size != 0)
                if size:
                    library = (
                        searched / "scratch" / "search" / "library" / f"layer-{number}" / f"{part}-{size}.safetensors"
                    )
                    source = library if library.is_file() else searched / "parent-by-block" / file
                    assert (searched / name / file).read_bytes() == source.read_bytes()
        written[name] = (searched / name / "embed_tokens.safetensors").read_bytes()
    assert len(set(written.values())) == 1


def test_an_untouched_parent_comes_out_as_it_went_in(
    tmp_path: Path, searched: Path, parent_folder: Path, corpus: Path, given_costs: Path
) -> None:
    config = CONFIG.model_copy(update={"limits": Limits(), "distillation": Distillation(num_steps=0)})
    search(
        config, context=quiet_context(tmp_path), out=tmp_path, parent=parent_folder, corpus=corpus, costs=given_costs
    )
    written = json.loads((tmp_path / "child" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"]
    child, parent = load_model(tmp_path / "child"), load_model(parent_folder)
    for name, tensor in parent.state_dict().items():
        assert torch.equal(child.state_dict()[name], tensor), name


def test_layers_are_what_the_recipe_fixes_linear_ones_too(tmp_path: Path, parent_folder: Path, corpus: Path) -> None:
    rules = {"0": {"ffn": 24}, "1": {"attention": "linear"}, "2": {"ffn": "linear"}, "3": {"attention": "own"}}
    values = {**CONFIG.model_dump(), "allow_plugin_only_blocks": True, "layers": rules, "limits": {"latency_ms": "60%"}}
    config = SearchConfig.parse(values)
    (tmp_path / "costs").mkdir()
    costs = write_costs(tmp_path / "costs", parent_folder, config)
    search(config, context=quiet_context(tmp_path), out=tmp_path, parent=parent_folder, corpus=corpus, costs=costs)
    table = json.loads((tmp_path / "search_table" / "search.json").read_text())
    for name in ("child", "random_child", "greedy_child"):
        layers = table[name]["layers"]
        assert layers[0]["intermediate_size"] == 24
        assert layers[1]["num_key_value_heads"] == "linear"
        assert layers[2]["intermediate_size"] == "linear"
        assert layers[3]["num_key_value_heads"] == 4
        assert load_model(tmp_path / name).num_parameters() == table[name]["parameters"]
    scores = {(block["layer"], block["part"], block["size"]): block for block in table["blocks"]}
    assert scores[2, "ffn", "linear"]["first_error"] < 1
    assert (3, "attention", 1) not in scores


def test_limits_that_nothing_meets_are_refused(
    tmp_path: Path, context: StageContext, parent_folder: Path, corpus: Path, given_costs: Path
) -> None:
    config = CONFIG.model_copy(update={"limits": Limits(latency_ms=0.5), "distillation": Distillation(num_steps=0)})
    with pytest.raises(InfeasibleBudget, match=r"latency_ms=0.5; the smallest reachable is 2"):
        search(config, context=context, out=tmp_path, parent=parent_folder, corpus=corpus, costs=given_costs)


def test_costs_of_another_space_are_refused(
    tmp_path: Path, context: StageContext, parent_folder: Path, given_costs: Path
) -> None:
    config = CONFIG.model_copy(update={"ffn_fractions": (1.0, 0.25)}).part(CostsConfig)
    with pytest.raises(RecipeError, match="have no ffn-16; they have attention-4"):
        costs(config, context=context, out=tmp_path, parent=parent_folder, own_costs=given_costs)


def test_an_interrupted_library_goes_on_to_the_same_bytes(
    tmp_path: Path, searched: Path, parent_folder: Path, corpus: Path
) -> None:
    config = CONFIG.model_copy(update={"distillation": Distillation(num_steps=6)}).part(LibraryConfig, shard="1/4")
    watched = quiet_context(searched).scratch / "search" / "importance"
    inputs = {"parent": parent_folder, "corpus": corpus, "importance": watched}
    library(config, context=quiet_context(tmp_path / "a"), out=tmp_path / "a", **inputs)

    asked = iter([False, False, True, True, True, True])
    context = quiet_context(tmp_path / "b")
    context.stopping = lambda: next(asked)
    with pytest.raises(Interrupted):
        library(config, context=context, out=tmp_path / "b", **inputs)
    context.stopping = lambda: False
    library(config, context=context, out=tmp_path / "b", **inputs)
    for path in sorted((tmp_path / "a" / "library").rglob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "b" / path.relative_to(tmp_path / "a")).read_bytes()


def test_fusion_can_be_left_out(
    tmp_path: Path, searched: Path, parent_folder: Path, corpus: Path, given_costs: Path
) -> None:
    config = CONFIG.model_copy(update={"fusion": Fusion(enabled=False), "distillation": Distillation(num_steps=0)})
    search(
        config, context=quiet_context(tmp_path), out=tmp_path, parent=parent_folder, corpus=corpus, costs=given_costs
    )
    table = json.loads((tmp_path / "search_table" / "search.json").read_text())
    assert all(len(layer["parent_layers"]) == 1 for layer in table["child"]["fused_layers"])


def test_a_parent_whose_layers_differ_is_searched(
    tmp_path: Path, parent: TesseraForCausalLM, parent_folder: Path, corpus: Path
) -> None:
    shape = ((4, 64), (2, 32), (0, 96), (1, 0))
    grown = heterogeneous_model(parent.config, shape)
    grown.config.parent_layers = [1, 2, 5, 6]
    save_model(grown, tmp_path / "parent", tokenizer=parent_folder)
    costs = write_costs(tmp_path, tmp_path / "parent", CONFIG)
    search(
        CONFIG, context=quiet_context(tmp_path), out=tmp_path, parent=tmp_path / "parent", corpus=corpus, costs=costs
    )
    table = SearchTable.model_validate_json((tmp_path / "search_table" / "search.json").read_text())
    own = [slot.options[0].size for slot in table.slots]
    assert own == [size for layer in shape for size in layer]
    offered = [[option.size for option in slot.options] for slot in table.slots]
    assert offered == [[4, 2, 1], [64, 32, 0], [2, 1, 0], [32, 16, 0], [0], [96, 48, 0], [1, 0], [0]]
    assert table.parent.parameters == grown.num_parameters()
    assert table.child.within_limits
    child = load_model(tmp_path / "child")
    assert len(child.model.layers) == len(table.child.fused_layers)
    assert child.num_parameters() < grown.num_parameters()
