"""Next-token training from scratch or onwards."""

from pathlib import Path

import torch
from pydantic import JsonValue
from tokenizers import Tokenizer
from transformers import LlamaConfig

from components.core.base.errors import RecipeError
from components.core.model.checkpoint import model_config
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.inspection import stored_dtype
from components.core.runtime.context import StageContext
from components.core.text.packing import corpus_stream
from components.core.text.tokenizer import eos_token_id
from components.core.text.tokenizer_files import CHAT_TEMPLATE
from components.core.training.loop import train
from components.core.training.losses import next_token_loss
from components.core.training.sharding import load_student, save_trained
from components.pretrain.config import PretrainConfig, Shape


def run(
    config: PretrainConfig,
    *,
    context: StageContext,
    out: Path,
    tokenizer: Path,
    corpus: Path,
    model: Path | None = None,
) -> dict[str, JsonValue]:
    """Train a new parent, or `model` further, on the corpus. Source: arXiv 2505.00949, section 2.2."""
    student = load_student(model, config, context) if model else new_model(config.shape, tokenizer, config.seed or 0)
    tokenizer_folder = model or tokenizer
    rows = context.scratch / "rows"
    stream = corpus_stream(
        corpus, tokenizer_folder, "train", seq_len=config.seq_len, seed=config.seed or 0, folder=rows
    )
    stored = stored_dtype(model) if model else "float32"
    losses = train(student, stream, next_token_loss, config, context, stored)
    # A new parent has a file for each sub-block, so that its children share those that do not change.
    dtype = getattr(torch, stored)
    save_trained(student, out / "trained", tokenizer=tokenizer_folder, dtype=dtype, by_block=model is None)
    if model is None and context.rank == 0:  # it was trained on documents, and knows no chat
        (out / "trained" / CHAT_TEMPLATE).unlink(missing_ok=True)
    return {"loss": losses[-1], "num_steps": len(losses)}


def new_model(shape: Shape, tokenizer: Path, seed: int) -> TesseraForCausalLM:
    """A dense Llama with random weights for a tokenizer's vocabulary.

    Projections that write to the residual stream start smaller, by the square root of their number, so that a deep
    model trains as fast at first as a shallow one (the initialisation of GPT-2).

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
    config = LlamaConfig(
        vocab_size=vocabulary, eos_token_id=eos_token_id(tokenizer), bos_token_id=None, **shape.model_dump()
    )
    torch.manual_seed(seed)
    model = TesseraForCausalLM(model_config(config.to_dict()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * shape.num_hidden_layers) ** -0.5)
    return model
