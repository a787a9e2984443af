"""Distillation of a child with fewer blocks from its parent."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig

from components.core.base.errors import InputError
from components.core.model.checkpoint import load_model, model_config, save_model
from components.core.model.decoder import TesseraForCausalLM
from components.core.text.packing import IGNORE, Batch, load_batches
from components.core.training.losses import distillation_loss, hidden_states, kl_sum, next_norms, paired_layers
from components.distill.config import DistillConfig
from components.distill.stage import run

CONFIG = DistillConfig(num_steps=25, global_batch_size=8, micro_batch_size=4, seq_len=32, learning_rate=1e-2, seed=1)
BLOCKS = [
    {"attention": {"no_op": False, "n_heads_in_group": 2}, "ffn": {"no_op": False, "intermediate_size": 32}},
    {"attention": {"no_op": True, "n_heads_in_group": None}, "ffn": {"no_op": False, "intermediate_size": 48}},
]
SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.2,
}


def parent_model(seed: int = 0, **changes: Any) -> TesseraForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 3, "intermediate_size": 64, **changes})
    return TesseraForCausalLM(model_config(config.to_dict()))


def child_model() -> TesseraForCausalLM:
    """Two layers of the parent's three: its second and third are one."""
    torch.manual_seed(1)
    values = {**SIZES, "model_type": "nemotron-nas", "num_hidden_layers": 2, "block_configs": BLOCKS}
    return TesseraForCausalLM(model_config({**values, "rope_theta": 10000.0, "parent_layers": [1, 3]}))


@pytest.fixture
def folders(tmp_path: Path, tokenizer_folder: Path) -> dict[str, Path]:
    save_model(parent_model(), tmp_path / "parent", tokenizer=tokenizer_folder)
    save_model(child_model(), tmp_path / "child", tokenizer=tokenizer_folder)
    return {"teacher": tmp_path / "parent", "student": tmp_path / "child"}


@pytest.fixture
def batch(sums: Path, tokenizer_folder: Path) -> Batch:
    return load_batches(sums, tokenizer_folder, "train", seq_len=32, batch_size=3, limit=1)[0]


@pytest.mark.parametrize(
    ("depths", "behind", "pairs"),
    [
        ((3, 3), None, [(1, 1), (2, 2), (-1, -1)]),
        ((4, 3), None, [(-1, -1)]),
        ((4, 2), [2, 4], [(2, 1), (-1, -1)]),
        ((4, 3), [1, 3, 4], [(1, 1), (3, 2), (-1, -1)]),
        ((1, 1), None, [(-1, -1)]),
    ],
)
def test_layers_pair_where_as_many_parent_layers_are_behind_them(depths, behind, pairs):
    def model(depth: int, **more: Any) -> TesseraForCausalLM:
        return cast("TesseraForCausalLM", SimpleNamespace(config=SimpleNamespace(num_hidden_layers=depth, **more)))

    child = model(depths[1]) if behind is None else model(depths[1], parent_layers=behind)
    assert paired_layers(model(depths[0]), child) == pairs


def test_the_child_keeps_its_pairs_in_its_folder(folders):
    parent, child = load_model(folders["teacher"]), load_model(folders["student"])

    assert paired_layers(parent, child) == [(1, 1), (-1, -1)]


def test_a_parent_has_nothing_to_teach_itself(batch):
    parent = parent_model()
    terms = distillation_loss(parent, paired_layers(parent, parent))(parent_model(), batch)

    assert {name: value.item() for name, value in terms.items()} == pytest.approx(
        {"loss": 0.0, "kl": 0.0, "cosine": 0.0}, abs=1e-3
    )


def test_the_loss_is_cosine_distance_and_kl_over_the_counted_positions(batch):
    parent, child = parent_model(), child_model()
    terms = distillation_loss(parent, [(1, 1), (-1, -1)])(child, batch)

    mask = batch.labels_BT != IGNORE
    kl = cosine = 0.0
    with torch.no_grad():
        deep, shallow = hidden_states(parent, batch), hidden_states(child, batch)
        for b, t in mask.nonzero().tolist():
            p, q = (m.lm_head(h[-1][b, t]).softmax(-1) for m, h in ((parent, deep), (child, shallow)))
            kl += float((p * (p.log() - q.log())).sum())
            cosine += sum(1 - float(F.cosine_similarity(shallow[i][b, t], deep[i][b, t], dim=0)) for i in (1, -1))
    assert terms["kl"].item() == pytest.approx(kl, rel=1e-4)
    assert terms["cosine"].item() == pytest.approx(cosine, rel=1e-4)
    assert terms["loss"].item() == pytest.approx(cosine + kl, rel=1e-4)


def with_uneven_norms(model: TesseraForCausalLM) -> TesseraForCausalLM:
    """The model, with norms that are not all ones."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 2.0)
    return model


def test_the_squared_difference_is_after_the_norm_that_the_parent_has_next_and_as_large_as_the_kl(batch):
    parent, child = with_uneven_norms(parent_model()), with_uneven_norms(child_model())
    terms = distillation_loss(parent, [(1, 1), (-1, -1)], "mse")(child, batch)

    mask = batch.labels_BT != IGNORE
    with torch.no_grad():
        deep, shallow = hidden_states(parent, batch), hidden_states(child, batch)
        norm = parent.model.layers[1].input_layernorm
        between = (norm(deep[1]) - norm(shallow[1]))[mask].square().mean(dim=-1).sum()
        last = (deep[-1] - shallow[-1])[mask].square().mean(dim=-1).sum()
    assert terms["mse"].item() == pytest.approx(float(between + last), rel=1e-4)
    assert terms["loss"].item() == pytest.approx(2 * terms["kl"].item(), rel=1e-4)
    parameters = list(child.parameters())
    both = torch.autograd.grad(terms["loss"], parameters, retain_graph=True, allow_unused=True)
    mse = torch.autograd.grad(terms["mse"], parameters, allow_unused=True)
    kl = torch.autograd.grad(distillation_loss(parent, [], None)(child, batch)["kl"], parameters, allow_unused=True)
    weight = terms["kl"].item() / terms["mse"].item()
    for found, of_mse, of_kl in zip(both, mse, kl, strict=True):
        parts = [weight * of_mse if of_mse is not None else None, of_kl]
        torch.testing.assert_close(found, sum(part for part in parts if part is not None), atol=1e-3, rtol=1e-3)


def test_the_norm_of_a_parent_without_attention_in_its_next_layer_is_that_of_its_ffn():
    parent = with_uneven_norms(child_model())  # its second layer has no attention
    states = torch.randn(3, 32)

    norms = next_norms(parent, [(1, 1), (2, 2), (-1, -1)])
    assert norms[0] is not None
    assert norms[1] is not None
    assert torch.equal(norms[0](states), parent.model.layers[1].post_attention_layernorm(states))
    assert torch.equal(norms[1](states), parent.model.norm(states))
    assert norms[2] is None


def test_without_hidden_states_the_loss_is_the_kl_alone(batch):
    parent, child = parent_model(), child_model()
    alone = distillation_loss(parent, paired_layers(parent, child), None)(child, batch)
    default = distillation_loss(parent, paired_layers(parent, child))(child, batch)

    assert alone.keys() == {"loss", "kl"}
    assert torch.equal(alone["loss"], alone["kl"])
    torch.testing.assert_close(alone["kl"], default["kl"])


def test_the_kl_of_the_top_logits_is_over_them_and_the_rest(batch):
    parent, child = parent_model(), child_model()
    pairs = paired_layers(parent, child)
    terms = {k: distillation_loss(parent, pairs, None, k)(child, batch)["kl"] for k in (4, 300, None)}

    mask = batch.labels_BT != IGNORE
    student, teacher = (hidden_states(model, batch)[-1][mask] for model in (child, parent))
    torch.testing.assert_close(terms[4], kl_sum(student, teacher, child.lm_head, parent.lm_head, 4))
    assert torch.equal(terms[300], terms[None])
    assert terms[4] < terms[None]


@pytest.mark.parametrize(
    "options", [{"hidden_state_loss": None}, {"hidden_state_loss": "mse"}, {"top_k_logits": 8}], ids=str
)
def test_the_child_learns_with_each_option(folders, recorded_context, recorder, out, sums, options):
    config = DistillConfig.model_validate(CONFIG.model_dump() | options)
    run(config, context=recorded_context, out=out, corpus=sums, **folders)

    curve = recorder.curve("kl")
    assert curve[-1] < 0.6 * curve[0]


def test_the_child_comes_closer_to_its_parent(folders, recorded_context, recorder, out, sums):
    before = (folders["teacher"] / "model.safetensors").read_bytes()
    result = run(CONFIG, context=recorded_context, out=out, corpus=sums, **folders)

    for name in ("loss", "kl", "cosine"):
        curve = recorder.curve(name)
        assert curve[-1] < 0.6 * curve[0], name
    assert result["num_steps"] == 25
    distilled = load_model(out / "distilled")
    assert distilled.config.block_configs == child_model().config.block_configs
    assert paired_layers(parent_model(), distilled) == [(1, 1), (-1, -1)]
    assert (folders["teacher"] / "model.safetensors").read_bytes() == before


def test_another_vocabulary_is_refused(folders, recorded_context, out, sums, tmp_path, tokenizer_folder):
    save_model(parent_model(vocab_size=301), tmp_path / "other", tokenizer=tokenizer_folder)

    with pytest.raises(InputError, match=r"different vocabularies \(301, 300\)"):
        run(
            CONFIG,
            context=recorded_context,
            out=out,
            corpus=sums,
            teacher=tmp_path / "other",
            student=folders["student"],
        )
