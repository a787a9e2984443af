import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, DynamicCache, LlamaConfig, LlamaForCausalLM

from components.core.model.architecture import LINEAR, Architecture, BlockConfig, Linear
from components.core.model.checkpoint import model_config
from components.core.model.decoder import TesseraConfig, TesseraForCausalLM
from components.core.training.greedy_decoding import complete
from tests.components.core import plain_decoder
from tests.components.core.dense_models import ROPES, SIZES, VARIETIES, VOCAB_SIZE, rope_model, twin, variety
from tests.components.core.nvidia_configs import super_49b

Block = tuple[int | Linear | None, int | Linear | None]
"""KV heads and FFN width; None: no attention, no FFN."""
NEW_TOKENS = 12
NO_TOKEN = -1
"""An end token that no model chooses."""
KINDS: list[Block] = list(itertools.product((None, LINEAR, 1, 2, 4), (None, LINEAR, 1, 40, 160)))
"""Every kind of block: no attention, one matrix, grouped, full; no FFN, one matrix, narrow, usual, fused."""


def heterogeneous(blocks: list[Block], **changes: Any) -> TesseraForCausalLM:
    """A random decoder with these KV heads and FFN widths."""
    layers = tuple(BlockConfig(num_key_value_heads=heads, intermediate_size=width) for heads, width in blocks)
    sizes: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_attention_heads": 4, "head_dim": 8}
    shape = Architecture(family="nemotron-nas", blocks=layers, **sizes)
    torch.manual_seed(1)
    config = TesseraConfig(
        **sizes, block_configs=shape.block_configs(), num_hidden_layers=len(blocks), initializer_range=0.2, **changes
    )
    model = TesseraForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.train(False)
    return model


def assert_close(actual: Tensor | None, expected: Tensor | None, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=atol, rtol=0.0)


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, VOCAB_SIZE, shape, generator=torch.Generator().manual_seed(3))


def logits(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(*args, **kwargs).logits
    return found


def reference(model: TesseraForCausalLM, row: Tensor) -> Tensor:
    weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
    return torch.from_numpy(plain_decoder.logits(model.config.to_dict(), weights, row.tolist())).float()


@pytest.mark.parametrize("name", VARIETIES)
def test_logits_are_those_of_transformers_where_nothing_is_changed(name: str) -> None:
    dense = variety(name)
    assert_close(logits(twin(dense), tokens(2, 30)), logits(dense, tokens(2, 30)))


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("length", [12, 60, 90])
def test_every_rope_scaling_is_that_of_transformers(kind: str, length: int) -> None:
    dense = rope_model(kind)
    assert_close(logits(twin(dense), tokens(1, length)), logits(dense, tokens(1, length)))


def test_gradients_are_those_of_transformers_where_nothing_is_changed() -> None:
    dense = variety("qwen2, tied")
    ours = twin(dense)
    for model in (dense, ours):
        model(tokens(2, 20), labels=tokens(2, 20)).loss.backward()
    theirs = {name: parameter.grad for name, parameter in dense.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, theirs[name])


@pytest.mark.parametrize("tied", [False, True])
def test_a_new_model_has_the_weights_that_transformers_draws_with_the_same_seed(tied: bool) -> None:
    config = LlamaConfig(**{**SIZES, "pad_token_id": None}, tie_word_embeddings=tied, initializer_range=0.1)
    torch.manual_seed(4)
    dense = LlamaForCausalLM(config)
    torch.manual_seed(4)
    ours = TesseraForCausalLM(model_config(config.to_dict()))
    torch.testing.assert_close(ours.state_dict(), dict(dense.state_dict()), rtol=0.0, atol=0.0)
    assert ours.num_parameters() == dense.num_parameters()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_kind_of_block_is_what_it_is_written_out(kind: Block) -> None:
    model = heterogeneous([(4, 40), kind, (2, 24)])
    row = tokens(11)
    assert_close(logits(model, row[None])[0], reference(model, row))


@pytest.mark.parametrize(("qkv", "o", "mlp"), itertools.product([False, True], repeat=3))
def test_biases_are_where_they_are_written_out(qkv: bool, o: bool, mlp: bool) -> None:
    model = heterogeneous([(2, 24), (None, 16)], qkv_bias=qkv, attention_bias=o, mlp_bias=mlp)
    row = tokens(7)
    assert_close(logits(model, row[None])[0], reference(model, row))


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6))
@settings(max_examples=25)
def test_packed_documents_do_not_see_each_other(lengths: list[int]) -> None:
    model = heterogeneous([(4, 24), (1, None), (None, 24), (2, 24)])
    row = tokens(sum(lengths))
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    alone = torch.cat([logits(model, part[None])[0] for part in torch.split(row, lengths)])
    packed = logits(model, row[None], segment_ids=segments[None], position_ids=positions[None])[0]
    assert_close(packed, alone)
    assert_close(logits(model, row[None], segment_ids=segments[None])[0], packed, atol=0.0)


def test_positions_restart_with_each_document_where_they_matter() -> None:
    # Dynamic scaling depends on absolute positions: two documents of 40 are not one of 80.
    model = twin(rope_model("dynamic"))
    rows, segments = tokens(1, 80), torch.arange(80)[None] // 40
    alone = torch.cat([logits(model, rows[:, :40]), logits(model, rows[:, 40:])], dim=1)
    assert_close(logits(model, rows, segment_ids=segments), alone)


CACHED: Mapping[str, list[Block]] = {
    "dense": [(4, 24), (4, 24)],
    "grouped": [(4, 24), (None, 24), (1, None), (None, None), (2, 8)],
    "attention comes late": [(None, 24), (None, 8), (2, 24)],
    "linear": [(LINEAR, 24), (4, LINEAR), (LINEAR, LINEAR), (2, 8)],
    "no attention": [(None, 24), (LINEAR, 8)],
}


@pytest.mark.parametrize("blocks", CACHED.values(), ids=CACHED)
def test_generation_with_the_cache_is_generation_without(blocks: list[Block]) -> None:
    model, prompts = heterogeneous(blocks), tokens(2, 6)
    without = prompts
    for _ in range(NEW_TOKENS):
        without = torch.cat([without, logits(model, without)[:, -1:].argmax(dim=-1)], dim=1)
    assert complete(model, prompts.tolist(), [NEW_TOKENS] * 2, NO_TOKEN) == without[:, 6:].tolist()


def test_a_prompt_in_pieces_gives_the_logits_of_the_whole() -> None:
    model, row = heterogeneous(CACHED["grouped"]), tokens(1, 20)
    cache = DynamicCache()
    pieces = [logits(model, piece, past_key_values=cache) for piece in torch.split(row, [7, 5, 1, 7], dim=1)]
    assert_close(torch.cat(pieces, dim=1), logits(model, row))


def test_layers_without_attention_take_no_place_in_the_cache() -> None:
    model = heterogeneous([(None, 24), (2, 24), (None, None), (LINEAR, 24), (1, 24)])
    cache = model(tokens(1, 5), use_cache=True).past_key_values
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(1, 2, 5, 8), (1, 1, 5, 8)]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_padding_on_the_left_changes_no_generated_token(name: str) -> None:
    dense = variety(name)
    model, short, long = twin(dense), tokens(1, 4), tokens(1, 9)
    library: Any = dense
    alone = library.generate(short, max_new_tokens=NEW_TOKENS, do_sample=False)
    padded, _ = complete(model, [*short.tolist(), *long.tolist()], [NEW_TOKENS] * 2, dense.config.eos_token_id)
    assert padded == alone[0, 4:].tolist()


def test_hidden_states_are_those_of_transformers() -> None:
    dense = variety("llama")
    ours = twin(dense)(tokens(1, 9), output_hidden_states=True).hidden_states
    theirs = dense(tokens(1, 9), output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


def test_only_the_last_logits_are_computed_where_asked() -> None:
    model = heterogeneous([(2, 24)])
    assert_close(logits(model, tokens(2, 9), logits_to_keep=1), logits(model, tokens(2, 9))[:, -1:])


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        model = heterogeneous([(4, 24), (None, 24), (2, None)])
        if recompute:
            model.model.activation_checkpointing = True
        model.train(True)
        model(tokens(2, 9), labels=tokens(2, 9), segment_ids=torch.arange(9).expand(2, 9) // 4).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_the_49b_configuration_loads_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = TesseraForCausalLM(model_config(super_49b()))
    assert sum(parameter.numel() for parameter in model.parameters()) == 49_867_145_216
    assert model.model.layers[6].self_attn is None
    assert model.model.layers[6].mlp.up_proj.out_features == 14336


def test_nvidia_configuration_is_read_by_the_class_itself(tmp_path: Path) -> None:
    ours = model_config(super_49b())
    ours.save_pretrained(tmp_path)
    AutoConfig.register("nemotron-nas", TesseraConfig, exist_ok=True)
    again = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(again, TesseraConfig)
    assert again.rope_parameters["factor"] == 8.0
    assert again.to_dict()["block_configs"] == ours.to_dict()["block_configs"]
    assert not hasattr(again.block_configs[0].ffn, "ffn_mult")


@pytest.fixture
def one_process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process_group")
def test_layers_can_be_sharded_one_by_one() -> None:
    whole, sharded = (heterogeneous(CACHED["grouped"]) for _ in range(2))
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.model.layers:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    for model in (whole, sharded):
        model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    for plain, part in zip(whole.parameters(), sharded.parameters(), strict=True):
        assert isinstance(part.grad, DTensor)
        assert_close(part.grad.full_tensor(), plain.grad)
