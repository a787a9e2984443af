"""The whole search on a GPU: every matrix product is computed there, and the outputs are those of the CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from components.core.model.checkpoint import read_weights
from components.core.runtime.context import StageContext, quiet_context
from components.core.runtime.placement import Placement
from components.search.config import Candidates, Distillation, Fusion, Limits, SearchConfig, TaskSet
from components.search.stages.search_step import search
from tests.components.pretend_gpu import GPUS, assert_same, computes_on_gpu
from tests.components.search.stages.test_search_step import CONFIG, write_costs

CHANGES = {
    "distillation": Distillation(num_steps=2, linear_batches=1),
    "allow_plugin_only_blocks": True,
    "num_key_value_heads": (4,),
    "no_op_ffn": False,
    "limits": Limits(latency_ms="45%"),  # leaves runs of FFNs that are fused
    "fusion": Fusion(keep_last=False, max_dependency=2.0),
}
WHOLE = {"task": TaskSet(num_problems=2, max_tokens=2), "candidates": Candidates(count=2, num_steps=1, batches=1)}
"""What a parent larger than memory is refused."""


def searched(config: SearchConfig, folder: Path, placement: Placement, **inputs: Path) -> dict[str, Any]:
    """The table and the weights of the children."""
    context: StageContext = replace(quiet_context(folder), placement=placement)
    search(config, context=context, out=folder, **inputs)  # type: ignore[arg-type]
    table = json.loads((folder / "search_table" / "search.json").read_text())
    children = {name: dict(read_weights(folder / name)) for name in ("child", "random_child", "greedy_child")}
    return {"table": table, "children": children}


@pytest.mark.parametrize("pretended", GPUS)
@pytest.mark.parametrize("paged", [False, True])
def test_the_search_computes_on_the_device_of_its_placement(
    tmp_path: Path, parent_folder: Path, corpus: Path, paged: bool, pretended: bool
) -> None:
    problems = tmp_path / "problems"
    problems.mkdir()
    rows = [{"id": str(a), "question": f"{a}+1=", "prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(2)]
    (problems / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = CONFIG.model_copy(update=CHANGES if paged else CHANGES | WHOLE)
    (tmp_path / "costs").mkdir()
    inputs = {"parent": parent_folder, "corpus": corpus, "problems": problems}
    inputs["costs"] = write_costs(tmp_path / "costs", parent_folder, config)
    memory_gib = 1e-6 if paged else 8.0
    on_cpu = searched(config, tmp_path / "cpu", Placement(threads=1, memory_gib=memory_gib), **inputs)
    with computes_on_gpu(pretended, memory_bytes=int(memory_gib * 2**30)):  # the memory of the node does not count
        on_gpu = searched(config, tmp_path / "gpu", Placement(threads=1, gpus=1), **inputs)

    if not pretended:  # other kernels, with which a near tie can be decided otherwise
        scores, expected = ([block["kl"] for block in run["table"]["blocks"]] for run in (on_gpu, on_cpu))
        assert scores == pytest.approx(expected, rel=0.05, abs=1e-3)
        return
    assert on_gpu["table"] == on_cpu["table"]
    for name, weights in on_cpu["children"].items():
        assert_same(on_gpu["children"][name], weights, pretended)
