"""A compiled pipeline and the local runner give the same keys and the same digests."""

import io
from collections.abc import Mapping
from pathlib import Path

import pytest
from rich.console import Console

from components.core.base.config import digest_of
from components.core.runtime.placement import Placement
from components.core.store.store import Store, open_store
from pipelines.recipe import registry
from pipelines.recipe.graph import Graph, Made, Source, Task
from pipelines.recipe.kfp_pipeline import compile_pipeline, component
from pipelines.recipe.llama_nemotron import llama_nemotron
from pipelines.recipe.schema import Recipe
from pipelines.records.runs import begin_stage, run_record, stage_documents
from pipelines.run.local_runner import run_graph
from tests.components.core.fake_stage import STAGE, FakeConfig, numbers_folder
from tests.pipelines.run.compiled_pipeline import run_compiled

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
ARITHMETIC = {"num_train": 60, "num_chats": 20, "num_validation": 10, "num_test": 10}
LEFT_OUT = ("search", "distill", "pretrain", "rl", "eval", "deploy")


def test_a_recipe_of_real_stages(tmp_path: Path) -> None:
    training = {"num_steps": 1, "global_batch_size": 2}
    recipe = Recipe.parse(
        {
            "name": "small",
            "placement": {"threads": 1},
            "data": {"arithmetic": ARITHMETIC},
            "parent_pretrain": {"shape": {**SHAPE, "intermediate_size": 32}, **training},
            "sft": training,
            **dict.fromkeys(LEFT_OUT),
        }
    )
    made = run_both_ways(llama_nemotron(recipe), {}, tmp_path)
    assert made.keys() == {"data", "parent", "sft"}


def test_a_fan_out_whose_items_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages in one loop, the second reading its own item of the first, and one that reads all items."""
    monkeypatch.setitem(dict_of_stages(), "fake", "tests.components.core.fake_stage:STAGE")
    monkeypatch.setitem(dict_of_stages(), "sum", "tests.pipelines.run.sum_stage:STAGE")
    images = dict.fromkeys(map(registry.stage_folder, ("fake", "sum")), "train")
    monkeypatch.setattr(registry, "STAGE_IMAGES", images)
    from tests.pipelines.run.sum_stage import STAGE as SUM

    shards, place = ("0/3", "1/3", "2/3"), Placement(threads=1)
    graph = Graph("fan-out", digest_of("fan-out"))
    graph.tasks += [
        Task("first", STAGE, FakeConfig(factor=2), place, {"numbers": Source("numbers")}),
        Task("loop", STAGE, FakeConfig(factor=3), place, {"numbers": Source("numbers")}, shards),
        Task("inner", SUM, FakeConfig(factor=5), place, {"total": Made("loop", "total")}, shards),
        Task("end", SUM, FakeConfig(), place, {"total": Made("first", "total"), "others": Made("inner", "sum")}),
    ]
    made = run_both_ways(graph, {"numbers": numbers_folder(tmp_path / "numbers", 1, 2)}, tmp_path)

    assert made.keys() == {"first", "end", *(f"{label}-{index}" for label in ("loop", "inner") for index in range(3))}
    (record,) = [record for record in open_store(tmp_path / "local").stage_records() if record.config["factor"] == 1]
    assert record.result == {"sum": 2 * 3 + 3 * (5 * 3 * 3)}


def run_both_ways(graph: Graph, files: Mapping[str, Path], folder: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Key and outputs of each task, which are the same in a store of a local run and of a compiled pipeline."""
    local, cluster = open_store(folder / "local"), open_store(folder / "cluster")
    sources = {name: local.put_folder(path, "data").digest for name, path in files.items()}
    assert sources == {name: cluster.put_folder(path, "data").digest for name, path in files.items()}

    component.cache_clear()
    compile_pipeline(graph, sources, folder / "pipeline.yaml")
    on_cluster = begin_stage(cluster, graph, {}, sources)
    run_compiled(folder / "pipeline.yaml", folder / "parameters", store=cluster.uri, run=on_cluster)
    assert run_record(cluster, on_cluster)["status"] == "succeeded"
    run = begin_stage(local, graph, {}, sources)
    run_graph(local, run, graph, sources, Console(file=io.StringIO()))

    made = results(local, run)
    assert results(cluster, on_cluster) == made
    return made


def results(store: Store, run: str) -> dict[str, tuple[str, dict[str, str]]]:
    """Key and outputs of each task of a run, all computed in this run."""
    found: dict[str, tuple[str, dict[str, str]]] = {}
    for label, document in stage_documents(store, run).items():
        record = store.stage_record(document["key"])
        assert record is not None
        assert document["cached"] is False
        found[label] = (record.key, record.outputs)
    return found


def dict_of_stages() -> dict[str, str]:
    stages = registry.STAGES
    assert isinstance(stages, dict)
    return stages
