"""A parent that takes more memory than the stage is given: the whole search, and the memory that it takes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from components.search.config import SearchConfig
from components.search.search_table import SearchTable
from tests.components.search.stages.test_search_step import write_costs

LAYERS, WEIGHTS_MIB = 40, 300
"""In float32; half of it on disk, in bfloat16."""
ROOM_MIB = 128
"""Memory beside that of the interpreter and its libraries: for a layer, the training of its variants, all variants."""

PROGRAM = """
import json, re, sys, threading, time
from pathlib import Path

import torch

from components.core.runtime.context import quiet_context
from components.core.runtime.placement import Placement
from components.search.config import SearchConfig
from components.search.stages.search_step import search

here, parent, corpus, costs = map(Path, sys.argv[1:5])
memory_gib, config = float(sys.argv[5]), SearchConfig.parse(json.loads(sys.argv[6]))
context = quiet_context(here)
context.placement = Placement(threads=1, memory_gib=memory_gib)
torch.nn.functional.cross_entropy(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)).backward()
torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)

def resident():
    # What this process wrote to and holds; mapped files, which the kernel takes back as it likes, do not count.
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10

def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.002)

before = peak = resident()
threading.Thread(target=watch, daemon=True).start()
search(config, context=context, out=here, parent=parent, corpus=corpus, costs=costs)
print(peak - before)
"""

CONFIG = {
    "ffn_fractions": [1.0, 0.125],
    "num_key_value_heads": [1],
    "no_op_ffn": False,
    "seq_len": 16,
    "batch_size": 1,
    "importance_batches": 2,
    "scoring_batches": 2,
    "distillation": {"num_steps": 2},
    "limits": {"latency_ms": "60%"},
    "fusion": {"max_channels": 3072, "max_dependency": 2.0, "keep_last": False},
    "pareto_points": 2,
}


@pytest.fixture(scope="module")
def large_parent(tmp_path_factory: pytest.TempPathFactory, parent_folder: Path) -> Path:
    """Forty layers in bfloat16, in a file each."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1024,
        max_position_embeddings=64,
        eos_token_id=0,
        bos_token_id=None,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    assert abs(4 * model.num_parameters() / 2**20 - WEIGHTS_MIB) < 15
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="4MB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(parent_folder / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory, large_parent: Path) -> Path:
    return write_costs(tmp_path_factory.mktemp("costs"), large_parent, SearchConfig.parse(CONFIG))


def run_search(here: Path, parent: Path, corpus: Path, costs: Path, *, memory_gib: float) -> int:
    """Search in a process of its own; returns its peak of resident memory beyond that of its libraries, MiB."""
    arguments = map(str, (here, parent, corpus, costs, memory_gib, json.dumps(CONFIG)))
    # Large tensors go back to the kernel when they are let go; the small ones that stand for them here shall as well.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_a_parent_larger_than_memory_is_searched_layer_by_layer_to_the_same_bytes(
    tmp_path: Path, large_parent: Path, corpus: Path, costs: Path
) -> None:
    inputs = (large_parent, corpus, costs)
    paged_mib = run_search(tmp_path / "paged", *inputs, memory_gib=ROOM_MIB / 1024)
    whole_mib = run_search(tmp_path / "whole", *inputs, memory_gib=8)
    assert paged_mib < ROOM_MIB < WEIGHTS_MIB / 2 < whole_mib
    for name in ("child", "random_child", "greedy_child", "search_table"):
        written, expected = (
            {path.name: path.read_bytes() for path in (tmp_path / run / name).iterdir()} for run in ("paged", "whole")
        )
        assert written.keys() == expected.keys(), name
        assert [file for file in expected if written[file] != expected[file]] == [], name
    table = SearchTable.model_validate_json((tmp_path / "whole" / "search_table" / "search.json").read_bytes())
    assert any(len(layer.parent_layers) > 1 for layer in table.random_child.fused_layers)
