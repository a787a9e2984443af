"""Fine-tuning on chats of both modes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from components.core.base.errors import CheckpointError, DataError
from components.core.model.checkpoint import load_model
from components.core.model.vocabulary import grow_vocabulary
from components.core.text.chat import prompt_ids
from components.core.text.toggle import END_THINK, THINK, system_message
from components.sft.config import SftConfig
from components.sft.stage import added_tokens, run
from tests.components.conftest import write_rows

CONFIG = SftConfig(num_steps=60, global_batch_size=4, micro_batch_size=4, seq_len=64, learning_rate=1e-2, seed=1)
ANSWERS = {"on": f"{THINK}3+4=7{END_THINK}7", "off": "7"}


def chat(mode: str, question: str = "3+4=", answer: str | None = None) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer or ANSWERS[mode]}]
    return {"messages": [system_message(mode), *turns], "reasoning": mode}


def llama(folder: Path, vocab_size: int) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = LlamaConfig(**sizes, **heads, vocab_size=vocab_size, eos_token_id=0, bos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    return folder


@pytest.fixture
def vocab_size(tokenizer_folder: Path) -> int:
    size: int = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).get_vocab_size()
    return size


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    (tmp_path / "chats").mkdir()
    write_rows(tmp_path / "chats" / "train.jsonl", [chat("on"), chat("off")] * 8)
    return tmp_path / "chats"


def test_the_model_learns_to_answer_in_either_mode(
    recorded_context, recorder, out, chats, tmp_path, tokenizer_folder, vocab_size
):
    model = llama(tmp_path / "model", vocab_size)
    result = run(CONFIG, context=recorded_context, out=out, model=model, tokenizer=tokenizer_folder, chats=chats)

    losses = recorder.curve("loss")
    assert losses[-1] < 0.1 * losses[0]
    assert result == {"loss": losses[-1], "num_steps": 60, "chats": 16}
    tuned: Any = AutoModelForCausalLM.from_pretrained(out / "tuned")
    tokenizer = Tokenizer.from_file(str(out / "tuned" / "tokenizer.json"))
    for mode, answer in ANSWERS.items():
        (prompt,) = prompt_ids(out / "tuned", ["3+4="], mode)
        ids = torch.tensor([prompt])
        found = tuned.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
        *answered, end = found[0, len(prompt) :].tolist()
        assert tokenizer.decode(answered, skip_special_tokens=False) == answer
        assert end == tuned.generation_config.eos_token_id == tokenizer.token_to_id("<|end|>")


def test_chats_that_do_not_fit_are_left_out_with_a_note(
    recorded_context, recorder, out, chats, tmp_path, tokenizer_folder, vocab_size
):
    write_rows(chats / "train.jsonl", [chat("on"), chat("off", answer="1" * 100), chat("off")])
    config, model = CONFIG.model_copy(update={"num_steps": 1}), llama(tmp_path / "model", vocab_size)
    result = run(config, context=recorded_context, out=out, model=model, tokenizer=tokenizer_folder, chats=chats)

    assert result["chats"] == 2
    assert recorder.notes == ["1 chats are longer than seq_len=64 and were left out"]


@pytest.mark.parametrize("rows", [[], [chat("on", answer="1" * 100)]])
def test_without_chats_there_is_nothing_to_learn(
    recorded_context, out, chats, tmp_path, tokenizer_folder, vocab_size, rows
):
    write_rows(chats / "train.jsonl", rows)
    with pytest.raises(DataError, match="no chats to learn from"):
        run(
            CONFIG,
            context=recorded_context,
            out=out,
            model=llama(tmp_path / "model", vocab_size),
            tokenizer=tokenizer_folder,
            chats=chats,
        )


def without_tags(tokenizer_folder: Path, folder: Path) -> Path:
    """The tokenizer of a model before the toggle: the tags are the last two tokens, and it lacks them."""
    described = json.loads((tokenizer_folder / "tokenizer.json").read_text())
    described["added_tokens"] = [t for t in described["added_tokens"] if t["content"] not in (THINK, END_THINK)]
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("spare_rows", [-2, 5])
def test_the_tags_start_as_different_words_of_the_usual_norm(tmp_path, tokenizer_folder, vocab_size, spare_rows):
    """Also where the model has rows for them, which were never trained."""
    model = load_model(llama(tmp_path / "model", vocab_size + spare_rows))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    known = without_tags(tokenizer_folder, tmp_path / "known")
    grow_vocabulary(model, added_tokens(model.config.vocab_size, tokenizer_folder, known))
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))

    assert model.config.vocab_size == (vocab_size + 5 if spare_rows == 5 else -(-vocab_size // 64) * 64)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old, rows = before[name], model.state_dict()[name]
        assert torch.equal(rows[: vocab_size - 2], old[: vocab_size - 2])
        for tag, meaning in ((THINK, "Let think step"), (END_THINK, "Therefore answer")):
            row = rows[tokenizer.token_to_id(tag)]
            words = old[tokenizer.encode(meaning, add_special_tokens=False).ids].mean(dim=0)
            assert torch.cosine_similarity(row, words, dim=0).item() == pytest.approx(1.0)
            assert row.norm().item() == pytest.approx(old.norm(dim=1).median().item(), rel=1e-5)
    think, end = (model.lm_head.weight[tokenizer.token_to_id(tag)] for tag in (THINK, END_THINK))
    assert torch.cosine_similarity(think, end, dim=0).item() < 0.9
    assert model(torch.tensor([[vocab_size - 1]])).logits.shape[-1] == model.config.vocab_size


def test_a_larger_vocabulary_of_the_model_stays(tmp_path, tokenizer_folder, vocab_size):
    model = load_model(llama(tmp_path / "model", vocab_size + 7))
    known = tokenizer_folder / "tokenizer.json"
    grow_vocabulary(model, added_tokens(model.config.vocab_size, tokenizer_folder, known))

    assert model.lm_head.weight.shape[0] == model.config.vocab_size == vocab_size + 7


def test_a_tokenizer_without_the_tags_is_refused(tmp_path, tokenizer_folder, vocab_size):
    text = (tokenizer_folder / "tokenizer.json").read_text().replace(END_THINK, "</thunk>")
    (tmp_path / "tokenizer.json").write_text(text)

    with pytest.raises(CheckpointError, match=f"no {THINK} and {END_THINK}"):
        added_tokens(vocab_size, tmp_path, known=tmp_path / "none")
