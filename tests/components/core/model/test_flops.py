"""Operations in closed form are those that torch counts on a real model."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from components.core.model.architecture import Architecture
from components.core.model.decoder import TesseraForCausalLM
from components.core.model.flops import forward_flops, training_flops
from components.core.text.packing import Batch
from components.core.training.losses import next_token_loss
from tests.components.core import tiny_models
from tests.components.core.llama_8b import LLAMA_8B

ROWS, TOKENS = 2, 24
KINDS: dict[str, tiny_models.Shapes] = {
    "alike": [(2, 96)] * 3,
    "all kinds of blocks": [(4, 40), ("linear", 17), (None, 100), (2, None), (1, "linear")],
}


def shape_of(model: TesseraForCausalLM) -> Architecture:
    return Architecture.from_config(model.config.to_dict())


def batch() -> Batch:
    """Rows of two documents, in which each position counts."""
    ids = torch.randint(2, tiny_models.VOCAB_SIZE, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    half = torch.arange(TOKENS) // (TOKENS // 2)
    return Batch(ids, ids, torch.arange(TOKENS).expand(ROWS, -1), (half + 1).expand(ROWS, -1))


def counted(work: Any) -> int:
    """Operations of some work; the plain attention shows its products to the counter."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


@pytest.mark.parametrize("kind", KINDS)
def test_a_forward_pass(kind: str) -> None:
    model = tiny_models.heterogeneous(0, KINDS[kind])
    with torch.no_grad():
        found = counted(lambda: model(batch().input_ids_BT))
        last = counted(lambda: model(batch().input_ids_BT, logits_to_keep=1))
    assert found == forward_flops(shape_of(model), ROWS * TOKENS, TOKENS)
    assert last == forward_flops(shape_of(model), ROWS * TOKENS, TOKENS, logits=ROWS)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step(kind: str, checkpointing: bool) -> None:
    model = tiny_models.heterogeneous(0, KINDS[kind]).train()
    if checkpointing:
        model.model.activation_checkpointing = True

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):  # the counter does not see into the operator for float32
            loss = next_token_loss(model, batch())["loss"]
        loss.backward()  # type: ignore[no-untyped-call]

    assert counted(step) == training_flops(shape_of(model), ROWS * TOKENS, TOKENS, checkpointing=checkpointing)


def test_the_rule_of_six_for_each_weight_and_token() -> None:
    llama_8b = Architecture.from_config(LLAMA_8B)
    without_embedding = llama_8b.parameters - 128256 * 4096
    pairs = 12 * 32 * 4096 * 8192  # of each token, as in arXiv 2204.02311, appendix B
    assert training_flops(llama_8b, 1, 8192) == pytest.approx(6 * without_embedding + pairs, rel=1e-4)
