"""Supervised fine-tuning on chats of both modes. Source: arXiv 2505.00949, section 4."""

from pathlib import Path

from pydantic import JsonValue
from tokenizers import Tokenizer
from torch import Tensor

from components.core.base.errors import CheckpointError, DataError
from components.core.model.checkpoint import load_model, resize_vocabulary, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.runtime.context import StageContext
from components.core.text.chat import END_THINK, THINK, encode_chats
from components.core.text.packing import Batch, PackedStream, eos_token_id, read_rows
from components.core.training.loop import train, unsharded
from components.core.training.losses import counted, cross_entropy_sum
from components.sft.config import SftConfig


def run(
    config: SftConfig, *, context: StageContext, out: Path, model: Path, tokenizer: Path, chats: Path
) -> dict[str, JsonValue]:
    """Tune `model` on chats that think and on chats that do not; only answers count in the loss."""
    student = load_model(model)
    fit_vocabulary(student, tokenizer)
    examples = encode_chats(read_rows(chats / "train.jsonl"), tokenizer)
    fitting = [example for example in examples if len(example.token_ids) <= config.seq_len]
    if len(fitting) < len(examples):
        context.note(f"{len(examples) - len(fitting)} chats are longer than seq_len={config.seq_len} and were left out")
    if not fitting:
        raise DataError("there are no chats to learn from", hint="give the recipe `sft:` chats, or a larger seq_len")
    losses = train(student, PackedStream(fitting, config.seq_len, config.seed or 0), answer_loss, config, context)
    whole = unsharded(student)
    if context.rank == 0:
        save_model(whole, out / "tuned", tokenizer=tokenizer)
    return {"loss": losses[-1], "num_steps": len(losses), "chats": len(fitting)}


def fit_vocabulary(model: TesseraForCausalLM, tokenizer: Path) -> None:
    """Add embedding rows for tokens that the model lacks, and set its end token to the tokenizer's.

    Raises:
        CheckpointError: the tokenizer has no tags.
    """
    vocabulary = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    if vocabulary.token_to_id(THINK) is None or vocabulary.token_to_id(END_THINK) is None:
        raise CheckpointError(
            f"the tokenizer has no {THINK} and {END_THINK}, which the toggle needs",
            hint="use the tokenizer from the data stage",
        )
    size = vocabulary.get_vocab_size()
    if size > model.config.vocab_size:
        resize_vocabulary(model, size)
    model.config.eos_token_id = eos_token_id(tokenizer)


def answer_loss(model: TesseraForCausalLM, batch: Batch) -> dict[str, Tensor]:
    """Cross-entropy of the answers' tokens."""
    output = model.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)
    hidden_ND, labels_N = counted(output.last_hidden_state, batch.labels_BT)
    return {"loss": cross_entropy_sum(hidden_ND, labels_N, model.lm_head)}
