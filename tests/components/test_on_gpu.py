"""The pretended GPU notices what a GPU would notice; and every training stage computes on it alone."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig

from components.core.model.checkpoint import model_config, read_weights, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.runtime.devices import backend_of
from components.core.runtime.placement import Placement
from components.core.runtime.resume import Resume
from components.core.text.toggle import system_message
from components.distill.config import DistillConfig
from components.distill.stage import run as distil
from components.pretrain.config import PretrainConfig
from components.pretrain.stage import run as pretrain
from components.sft.config import SftConfig
from components.sft.stage import run as tune
from tests.components.conftest import write_rows
from tests.components.pretend_gpu import GPU, GPUS, assert_same, computes_on_gpu, pretend_gpu

SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
STEPS: dict[str, Any] = {"num_steps": 2, "global_batch_size": 4, "micro_batch_size": 2, "seq_len": 64, "seed": 1}


def test_tensors_of_two_devices_do_not_meet_and_copies_have_the_same_values() -> None:
    here = torch.arange(4.0).requires_grad_()
    with pretend_gpu() as operations:
        there = here.to(GPU)
        assert (there.device, here.device, there.cpu().device) == (GPU, torch.device("cpu"), torch.device("cpu"))
        assert torch.ones(2, device=GPU).device == GPU
        assert (2 * there + torch.tensor(1.0)).tolist() == [1, 3, 5, 7]
        mixtures: list[Callable[[], torch.Tensor]] = [
            lambda: there + here,
            lambda: torch.stack([there, here]),
            lambda: here[there > 1],
        ]
        for mixed in mixtures:
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        layer = nn.Linear(4, 1)
        layer.to(GPU)
        layer(there).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.device == GPU
        assert operations.products["cpu"] == 0


@pytest.fixture
def inputs(tmp_path: Path, tokenizer_folder: Path, sums: Path) -> dict[str, Path]:
    torch.manual_seed(0)
    vocabulary = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).get_vocab_size()
    config = LlamaConfig(**SIZES, vocab_size=vocabulary, eos_token_id=0, bos_token_id=None, max_position_embeddings=64)
    model = TesseraForCausalLM(model_config(config.to_dict()))
    save_model(model, tmp_path / "model", tokenizer=tokenizer_folder)
    (tmp_path / "chats").mkdir()
    turns = [{"role": "user", "content": "3+4="}, {"role": "assistant", "content": "7"}]
    write_rows(tmp_path / "chats" / "train.jsonl", [{"messages": [system_message("off"), *turns], "reasoning": "off"}])
    return {
        "model": tmp_path / "model",
        "tokenizer": tokenizer_folder,
        "corpus": sums,
        "chats": tmp_path / "chats",
    }


@pytest.mark.parametrize("pretended", GPUS)
@pytest.mark.parametrize("stage", ["pretrain", "distill", "sft"])
def test_a_training_stage_computes_on_the_device_of_its_placement(
    tmp_path: Path, recorded_context: StageContext, inputs: dict[str, Path], stage: str, pretended: bool
) -> None:
    model, corpus, tokenizer = inputs["model"], inputs["corpus"], inputs["tokenizer"]

    def trained(device: str, gpus: int) -> dict[str, torch.Tensor]:
        """The weights after two steps, the second of them after a resume point was written and read."""
        out = tmp_path / device
        out.mkdir()
        context = replace(
            recorded_context, placement=Placement(threads=1, gpus=gpus), resume=Resume(tmp_path / f"{device}-resume")
        )
        common: dict[str, Any] = {"context": context, "out": out}
        if stage == "pretrain":
            config = PretrainConfig(**STEPS, resume_interval_s=1e-9)
            pretrain(config, **common, model=model, tokenizer=tokenizer, corpus=corpus)
            pretrain(
                config,
                context=context,
                out=tmp_path / f"{device}-again",
                model=model,
                tokenizer=tokenizer,
                corpus=corpus,
            )
        elif stage == "distill":
            distil(DistillConfig(**STEPS), **common, teacher=model, student=model, corpus=corpus)
        else:
            tune(SftConfig(**STEPS), **common, model=model, tokenizer=tokenizer, chats=inputs["chats"])
        return dict(read_weights(next(out.iterdir())))

    on_cpu = trained("cpu", 0)
    with computes_on_gpu(pretended):
        on_gpu = trained("gpu", 1)
    assert_same(on_gpu, on_cpu, pretended)


@pytest.mark.gpu
def test_an_offloaded_training_makes_the_model_of_the_cpu(
    tmp_path: Path, recorded_context: StageContext, inputs: dict[str, Path]
) -> None:
    def trained(name: str, placement: Placement) -> dict[str, torch.Tensor]:
        context = replace(recorded_context, placement=placement, resume=Resume(tmp_path / f"{name}-resume"))
        files = {key: inputs[key] for key in ("model", "tokenizer", "corpus")}
        pretrain(PretrainConfig(**STEPS, resume_interval_s=1e-9), context=context, out=tmp_path / name, **files)
        return dict(read_weights(next((tmp_path / name).iterdir())))

    expected = trained("cpu", Placement(threads=1))
    offloaded = Placement(threads=1, gpus=1, offload=True)
    backend = backend_of(torch.device("cuda"))
    dist.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with computes_on_gpu(pretended=False):
            found = trained("offloaded", offloaded)
    finally:
        dist.destroy_process_group()
    assert_same(found, expected, pretended=False)
