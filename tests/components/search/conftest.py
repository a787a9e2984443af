"""A tiny parent with a tokenizer and a corpus, in seconds."""

import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext, quiet_context
from components.core.text.packing import Batch, load_batches

LETTERS = "0123456789+-*= "


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums of two digits: prompts, and completions that count."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(0)
    for split, rows in (("train", 400), ("validation", 80)):
        with (folder / f"{split}.jsonl").open("w") as stream:
            for _ in range(rows):
                a, b = generator.randrange(10), generator.randrange(10)
                stream.write(
                    json.dumps({"prompt": f"{a}+{b}=", "completion": f"{a}+{b}={a + b} {(a + b) % 10}"}) + "\n"
                )
    return folder


@pytest.fixture(scope="session")
def parent_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain Hugging Face Llama of four layers, 4 query and 4 KV heads of size 32, random but not small weights."""
    folder = tmp_path_factory.mktemp("parent")
    vocabulary = {letter: number for number, letter in enumerate(["<eos>", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=256,
        eos_token_id=0,
        bos_token_id=None,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<eos>"}))
    return folder


@pytest.fixture
def parent(parent_folder: Path) -> TesseraForCausalLM:
    model = load_model(parent_folder)
    return model.requires_grad_(False)


@pytest.fixture(scope="session")
def batches(corpus: Path, parent_folder: Path) -> list[Batch]:
    return load_batches(corpus, parent_folder, "validation", seq_len=32, batch_size=4, limit=2)


@pytest.fixture
def context(tmp_path: Path) -> StageContext:
    return quiet_context(tmp_path / "job")
