"""Pretraining on sums, from scratch and onwards."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from components.core.base.errors import RecipeError
from components.core.model.checkpoint import load_model
from components.core.text.packing import IGNORE, load_batches
from components.core.text.toggle_template import ChatTemplate
from components.pretrain.config import PretrainConfig, Shape
from components.pretrain.stage import new_model, run

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
CONFIG = PretrainConfig(
    num_steps=40, global_batch_size=8, micro_batch_size=8, seq_len=32, learning_rate=1e-2, shape=Shape(**SHAPE), seed=1
)


def held_out_loss(model: Any, corpus: Path, tokenizer: Path) -> float:
    """Cross-entropy a counted token by transformers and PyTorch alone, one document after the other."""
    (batch,) = load_batches(corpus, tokenizer, "validation", seq_len=7, batch_size=100, limit=1)
    with torch.no_grad():
        logits = model(batch.input_ids_BT).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels_BT.flatten(), ignore_index=IGNORE
    ).item()


def test_a_new_model_starts_at_chance_learns_and_is_a_plain_llama(
    recorded_context, recorder, out, sums, tokenizer_folder
):
    result = run(CONFIG, context=recorded_context, out=out, tokenizer=tokenizer_folder, corpus=sums)
    losses = recorder.curve("loss")

    assert len(losses) == 40
    vocabulary = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json")).get_vocab_size()
    assert losses[0] == pytest.approx(math.log(vocabulary), abs=0.1)
    assert result == {"loss": losses[-1], "num_steps": 40}
    assert losses[-1] < 0.5 * losses[0]
    plain = AutoModelForCausalLM.from_pretrained(out / "trained")
    assert plain.config.model_type == "llama"
    assert held_out_loss(plain, sums, out / "trained") == pytest.approx(losses[-1], rel=0.25)


def test_training_goes_on_from_a_model_with_its_own_tokenizer(
    recorded_context, recorder, out, sums, tokenizer_folder, tmp_path
):
    run(CONFIG, context=recorded_context, out=out, tokenizer=tokenizer_folder, corpus=sums)
    end = recorder.curve("loss")[-1]
    recorder.events.clear()
    (tmp_path / "out2" / "trained").mkdir(parents=True)
    recorded_context.resume.folder = tmp_path / "another"
    onwards = CONFIG.model_copy(update={"num_steps": 5, "learning_rate": 1e-3})
    run(
        onwards,
        context=recorded_context,
        out=tmp_path / "out2",
        tokenizer=tmp_path / "absent",
        corpus=sums,
        model=out / "trained",
    )

    assert recorder.curve("loss")[0] == pytest.approx(end, rel=0.3)
    assert (tmp_path / "out2" / "trained" / "tokenizer.json").is_file()
    for folder in (out, tmp_path / "out2"):
        assert ChatTemplate.of(folder / "trained") is None  # a new model knows no chat


def test_equal_seeds_give_equal_models_and_other_seeds_others(tokenizer_folder):
    first, same, other = (new_model(CONFIG.shape, tokenizer_folder, seed).state_dict() for seed in (1, 1, 2))

    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_what_writes_to_the_residual_stream_starts_smaller(tokenizer_folder):
    model = new_model(Shape(**{**SHAPE, "hidden_size": 128, "num_hidden_layers": 8}), tokenizer_folder, 0)
    layer = model.model.layers[0]

    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
        assert writer.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def test_a_model_of_any_seed_can_be_loaded_again_unchanged(recorded_context, out, sums, tokenizer_folder):
    short = CONFIG.model_copy(update={"num_steps": 1})
    run(short, context=recorded_context, out=out, tokenizer=tokenizer_folder, corpus=sums)
    ours, plain = load_model(out / "trained"), AutoModelForCausalLM.from_pretrained(out / "trained")
    ids = torch.arange(20)[None]

    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 3}, "hidden_size=32 does not divide by num_attention_heads=3"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "does not divide by num_key_value_heads=3"),
    ],
)
def test_heads_that_do_not_divide_are_refused(change, message):
    with pytest.raises(RecipeError, match=message):
        PretrainConfig.parse({"num_steps": 1, "shape": {**SHAPE, **change}}, where="parent")
