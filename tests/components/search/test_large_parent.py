"""A parent that takes more memory than there is: importance and library under a hard limit of the kernel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, WEIGHTS_MIB = 40, 290
"""In float32; half of it on disk, in bfloat16."""
ROOM_MIB = 64
"""Memory beside that of the interpreter and its libraries: for a layer and the training of its variants."""

PROGRAM = """
import json, resource, sys
from pathlib import Path

import torch

from components.core.job import Placement, silent_job
from components.search.config import ImportanceConfig, LibraryConfig, SearchConfig
from components.search.importance_stage import importance
from components.search.library_stage import library

here, parent, corpus, memory_gib = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4])
config = SearchConfig.parse(json.loads(sys.argv[5]))
job = silent_job(here)
job.placement = Placement(threads=1, memory_gib=memory_gib)
torch.nn.functional.cross_entropy(torch.ones(2, 2, requires_grad=True), torch.ones(2, 2)).backward()
taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + (int(sys.argv[6]) << 20),) * 2)
inputs = {"job": job, "out": here, "parent": parent, "corpus": corpus}
importance(config.part(ImportanceConfig), **inputs)
library(config.part(LibraryConfig), importance=here / "importance", **inputs)
"""

CONFIG = {
    "ffn_fractions": [1.0, 0.125],
    "num_key_value_heads": [1],
    "seq_len": 32,
    "batch_size": 2,
    "importance_batches": 2,
    "scoring_batches": 1,
    "distillation": {"num_steps": 2},
}


@pytest.fixture(scope="module")
def large_parent(tmp_path_factory: pytest.TempPathFactory, parent_folder: Path) -> Path:
    """Forty layers in bfloat16, in a file each."""
    folder = tmp_path_factory.mktemp("large")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=2208,
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


def run_steps(here: Path, parent: Path, corpus: Path, *, memory_gib: float) -> "subprocess.CompletedProcess[str]":
    arguments = [str(here), str(parent), str(corpus), str(memory_gib), json.dumps(CONFIG), str(ROOM_MIB)]
    # Large tensors go back to the kernel when they are let go; the small ones that stand for them here shall as well.
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_a_parent_larger_than_memory_is_searched_layer_by_layer(
    tmp_path: Path, large_parent: Path, corpus: Path
) -> None:
    done = run_steps(tmp_path / "paged", large_parent, corpus, memory_gib=ROOM_MIB / 1024)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(list((tmp_path / "paged" / "library").rglob("*.safetensors"))) == 2 * LAYERS
    whole = run_steps(tmp_path / "whole", large_parent, corpus, memory_gib=8)
    assert whole.returncode != 0
    assert "memory" in whole.stderr, whole.stderr[-2000:]
