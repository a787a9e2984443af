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
from components.core.training.losses import distillation_loss, hidden_states, paired_layers
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
