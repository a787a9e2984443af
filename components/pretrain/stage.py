"""Next-token training from scratch or onwards."""

from pathlib import Path

import torch
from pydantic import JsonValue
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from components.core.batches import Batch, PackedStream, eos_token_id, load_corpus
from components.core.checkpoint import load_model, save_model
from components.core.errors import RecipeError
from components.core.job import Job
from components.core.losses import counted, cross_entropy_sum
from components.core.model import TesseraForCausalLM
from components.core.train import StepLoss, train, unsharded
from components.pretrain.config import PretrainConfig, Shape


def run(
    config: PretrainConfig, *, job: Job, out: Path, tokenizer: Path, corpus: Path, model: Path | None = None
) -> dict[str, JsonValue]:
    """Train a new parent, or `model` further, on the corpus. Source: arXiv 2505.00949, section 2.2."""
    source = model or new_model(config.shape, tokenizer, job.scratch / "new", config.seed or 0)
    student = load_model(source)
    stream = PackedStream(load_corpus(corpus, source, "train"), config.seq_len, config.seed or 0)
    losses = train(student, stream, next_token_loss, config, job)
    whole = unsharded(student)
    if job.rank == 0:
        save_model(whole, out / "trained", tokenizer=source)
    return {"loss": losses[-1], "num_steps": len(losses)}


def next_token_loss(model: TesseraForCausalLM, batch: Batch) -> StepLoss:
    """Cross-entropy of the counted tokens."""
    hidden_BTD = model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    hidden_ND, labels_N = counted(hidden_BTD.last_hidden_state, batch.labels_BT)
    return StepLoss(cross_entropy_sum(hidden_ND, labels_N, model.lm_head), labels_N.numel())


def new_model(shape: Shape, tokenizer: Path, folder: Path, seed: int) -> Path:
    """Write a dense Llama with random weights, a plain Hugging Face folder, with the tokenizer beside it.

    Raises:
        RecipeError: heads do not divide.
    """
    for name, value, by in (
        ("hidden_size", shape.hidden_size, shape.num_attention_heads),
        ("num_attention_heads", shape.num_attention_heads, shape.num_key_value_heads),
    ):
        if value % by:
            raise RecipeError(f"{name}={value} does not divide into {by} heads", hint=f"choose a divisor of {value}")
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json")).get_vocab_size()
    settings = shape.model_dump()
    config = LlamaConfig(vocab_size=vocabulary, eos_token_id=eos_token_id(tokenizer), bos_token_id=None, **settings)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    for file in tokenizer.iterdir():
        if file.name not in ("config.json", "generation_config.json"):
            (folder / file.name).write_bytes(file.read_bytes())
    return folder
