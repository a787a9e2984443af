"""Training stages on two ranks, each with a part of student and teacher, make the models of one process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from transformers import LlamaConfig

from components.core.model.checkpoint import model_config, read_weights, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.inspection import read_config
from components.core.runtime.context import StageContext
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.text.toggle import END_THINK, THINK, system_message
from components.core.training import step_memory
from components.distill.config import DistillConfig
from components.distill.stage import run as distil
from components.pretrain.config import PretrainConfig, Shape
from components.pretrain.stage import run as pretrain
from components.sft.config import SftConfig
from components.sft.stage import run as tune
from tests.components.conftest import Recorder, write_rows
from tests.waiting import PATIENCE_S

STEPS: dict[str, Any] = {"num_steps": 3, "global_batch_size": 6, "micro_batch_size": 2, "seq_len": 64, "seed": 1}
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
SHAPE = Shape(**SIZES, num_key_value_heads=1, max_position_embeddings=64)
STAGES = ("new", "trained", "distilled", "tuned")


def run_stages(inputs: Path, folder: Path, rank: int = 0) -> dict[str, Any]:
    """Run each training stage; the folders of their models are in `folder`."""
    results: dict[str, Any] = {}

    def arguments(name: str) -> dict[str, Any]:
        (folder / name).mkdir(parents=True, exist_ok=True)
        placement = Placement(threads=1)
        context = StageContext(Recorder(), Resume(folder / name / "resume"), folder / name, placement, rank)
        return {"context": context, "out": folder / name / "out"}

    corpus, tokenizer, model = inputs / "corpus", inputs / "tokenizer", inputs / "model"
    base: dict[str, Any] = {"corpus": corpus, "tokenizer": tokenizer}
    results["new"] = pretrain(PretrainConfig(**STEPS, shape=SHAPE), **base, **arguments("new"))
    results["trained"] = pretrain(PretrainConfig(**STEPS), **base, model=model, **arguments("trained"))
    results["distilled"] = distil(
        DistillConfig(**STEPS), teacher=inputs / "teacher", student=model, corpus=corpus, **arguments("distilled")
    )
    results["tuned"] = tune(
        SftConfig(**STEPS), model=model, tokenizer=tokenizer, chats=inputs / "chats", **arguments("tuned")
    )
    return results


@pytest.fixture
def inputs(tmp_path: Path, tokenizer_folder: Path, sums: Path) -> Path:
    folder = tmp_path / "inputs"
    folder.mkdir()
    (folder / "corpus").symlink_to(sums)
    (folder / "tokenizer").symlink_to(tokenizer_folder)
    vocabulary = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).get_vocab_size()
    for seed, (name, dtype) in enumerate((("model", torch.float32), ("teacher", torch.bfloat16))):
        torch.manual_seed(seed)
        tied = name == "teacher"
        config = LlamaConfig(
            **SIZES, vocab_size=vocabulary - 2, eos_token_id=0, bos_token_id=None, tie_word_embeddings=tied
        )
        model = TesseraForCausalLM(model_config(config.to_dict()))
        save_model(model, folder / name, tokenizer=tokenizer_folder, dtype=dtype)
    (folder / "chats").mkdir()
    modes = {"on": f"{THINK}3+4=7{END_THINK}7", "off": "7"}
    rows = [
        {
            "messages": [
                system_message(mode),
                {"role": "user", "content": "3+4="},
                {"role": "assistant", "content": answer},
            ],
            "reasoning": mode,
        }
        for mode, answer in modes.items()
    ]
    write_rows(folder / "chats" / "train.jsonl", rows * 8)
    return folder


def test_two_ranks_make_the_models_of_one_process(tmp_path: Path, inputs: Path) -> None:
    one = run_stages(inputs, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    ended = subprocess.run(
        [*command, __file__, str(tmp_path)], env=environment, capture_output=True, timeout=PATIENCE_S, text=True
    )
    assert ended.returncode == 0, ended.stderr
    two = json.loads((tmp_path / "two.json").read_text())

    for name in STAGES:
        assert two[name]["loss"] == pytest.approx(one[name]["loss"], abs=1e-5), name
        expected, found = (next((tmp_path / ranks / name / "out").iterdir()) for ranks in ("one", "two"))
        assert {path.name for path in found.iterdir()} == {path.name for path in expected.iterdir()}
        assert read_config(found) == read_config(expected)
        weights = dict(read_weights(expected))
        for key, value in read_weights(found):
            torch.testing.assert_close(value, weights.pop(key), atol=1e-4, rtol=1e-4, msg=f"{name}: {key}")
        assert weights == {}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    step_memory.OWN_GROUP_PARAMETERS = 1  # each layer, the embedding and the head are gathered by themselves
    results = run_stages(folder / "inputs", folder / "two", dist.get_rank())
    if dist.get_rank() == 0:
        (folder / "two.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
