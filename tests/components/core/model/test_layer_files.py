"""A paged model computes what a resident one does, with one layer in memory."""

from pathlib import Path

import pytest
import torch

from components.core.model.checkpoint import load_model
from components.core.model.decoder import TesseraForCausalLM
from tests.components.core.tiny_models import llama

TOKENS_BT = torch.arange(24).reshape(2, 12) % 16


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama in bfloat16, in several files."""
    model = llama(0)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    return tmp_path


def layers_in_memory(model: TesseraForCausalLM) -> list[int]:
    return [n for n, layer in enumerate(model.model.layers) if not any(p.is_meta for p in layer.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, None])
def test_a_paged_model_says_the_same(folder: Path, dtype: torch.dtype | None) -> None:
    paged, resident = (load_model(folder, dtype=dtype, paged=paged) for paged in (True, False))
    assert layers_in_memory(paged) == []
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(paged(TOKENS_BT).logits, resident(TOKENS_BT).logits)
            assert layers_in_memory(paged) == [2]
    assert not any(parameter.requires_grad for parameter in paged.parameters())


def test_the_state_of_a_layer_or_of_a_module_in_it_brings_the_layer(folder: Path) -> None:
    paged, resident = load_model(folder, paged=True), load_model(folder)
    for name, tensor in resident.model.layers[1].state_dict().items():
        assert torch.equal(paged.model.layers[1].state_dict()[name], tensor)
    norm = paged.model.layers[0].input_layernorm.state_dict()
    assert torch.equal(norm["weight"], resident.model.layers[0].input_layernorm.weight)
    assert layers_in_memory(paged) == [0]
    whole = paged.state_dict()
    for name, tensor in resident.state_dict().items():
        assert torch.equal(whole[name], tensor)
