"""Training-free variants, by hand."""

import pytest
import torch

from components.core.model.checkpoint import model_config
from components.core.model.decoder import Attention
from components.search.space.layer_space import Variant
from components.search.space.subblocks import initialise, keep_channels, most_important, pool_kv_heads, subblock_weights

SIZES = {
    "vocab_size": 4,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "head_dim": 2,
    "intermediate_size": 4,
}


def ffn(width: int, hidden: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(width)
    return {
        "post_attention_layernorm.weight": torch.rand(hidden),
        "mlp.gate_proj.weight": torch.randn(width, hidden),
        "mlp.up_proj.weight": torch.randn(width, hidden),
        "mlp.down_proj.weight": torch.randn(hidden, width),
    }


def test_most_important_channels_come_best_first_and_ties_keep_their_order() -> None:
    assert most_important(torch.tensor([1.0, 5.0, 5.0, 9.0]), 3).tolist() == [3, 1, 2]


def test_a_narrower_ffn_is_the_prefix_of_the_channels_by_importance() -> None:
    parent, importance = ffn(3), torch.tensor([0.1, 3.0, 2.0])
    narrow = initialise(parent, Variant("ffn", 2), importance_I=importance, head_dim=2)
    torch.testing.assert_close(narrow["mlp.up_proj.weight"], parent["mlp.up_proj.weight"][[1, 2]])
    torch.testing.assert_close(narrow["mlp.gate_proj.weight"], parent["mlp.gate_proj.weight"][[1, 2]])
    torch.testing.assert_close(narrow["mlp.down_proj.weight"], parent["mlp.down_proj.weight"][:, [1, 2]])
    torch.testing.assert_close(narrow["post_attention_layernorm.weight"], parent["post_attention_layernorm.weight"])


def test_kv_heads_that_merge_are_averaged_weights_and_biases() -> None:
    rows = torch.arange(8.0)  # four heads of size two
    attention = {
        "self_attn.k_proj.weight": rows[:, None].expand(8, 3),
        "self_attn.v_proj.bias": rows,
        "self_attn.q_proj.weight": torch.ones(8, 3),
    }
    pooled = pool_kv_heads(attention, 2, head_dim=2)
    # heads (0,1) and (2,3): means of rows 0 and 2, 1 and 3, then of rows 4 and 6, 5 and 7
    assert pooled["self_attn.v_proj.bias"].tolist() == [1, 2, 5, 6]
    assert pooled["self_attn.k_proj.weight"][:, 0].tolist() == [1, 2, 5, 6]
    assert pooled["self_attn.q_proj.weight"].shape == (8, 3)


def test_a_no_op_has_no_weights() -> None:
    assert initialise(ffn(3), Variant("ffn", 0), importance_I=None, head_dim=2) == {}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_linear_attention_is_the_attention_of_a_token_that_sees_itself_alone(kv_heads: int) -> None:
    config = model_config({"model_type": "llama", **SIZES, "num_key_value_heads": kv_heads})
    attention = Attention(config, 0)
    own = {"input_layernorm.weight": torch.ones(8)}
    own |= {f"self_attn.{name}": tensor.detach() for name, tensor in attention.named_parameters()}
    found = initialise(own, Variant("attention", "linear"), importance_I=None, head_dim=2)
    alone_BTD, alike_BTD = torch.randn(5, 1, 8), torch.randn(5, 1, 8).expand(5, 6, 8)
    for x_BTD in (alone_BTD, alike_BTD):  # what sees only its like has nothing to choose from
        angles = torch.rand(1, x_BTD.shape[1], 2)
        expected = attention(x_BTD, (angles.cos(), angles.sin()), None, None)
        torch.testing.assert_close(x_BTD @ found["self_attn.linear_attn.weight"].T, expected)
    assert found.keys() == {"input_layernorm.weight", "self_attn.linear_attn.weight"}


def test_a_linear_ffn_is_the_ffn_with_its_gate_open() -> None:
    parent, x = ffn(3), torch.randn(6, 4)
    found = initialise(parent, Variant("ffn", "linear"), importance_I=None, head_dim=2)
    expected = (x @ parent["mlp.up_proj.weight"].T) @ parent["mlp.down_proj.weight"].T
    torch.testing.assert_close(x @ found["mlp.linear_mlp.weight"].T, expected)
    assert found.keys() == {"post_attention_layernorm.weight", "mlp.linear_mlp.weight"}


def test_a_linear_part_of_the_parent_stays_as_it_is() -> None:
    own = {"post_attention_layernorm.weight": torch.ones(4), "mlp.linear_mlp.weight": torch.randn(4, 4)}
    assert initialise(own, Variant("ffn", "linear"), importance_I=None, head_dim=2) == own


def test_a_narrower_ffn_needs_the_importance_of_every_channel() -> None:
    with pytest.raises(ValueError, match="all 3 channels"):
        initialise(ffn(3), Variant("ffn", 2), importance_I=torch.ones(2), head_dim=2)


def test_subblocks_share_a_layer_by_name() -> None:
    state = {"mlp.up_proj.weight": torch.ones(1), "input_layernorm.weight": torch.ones(1)}
    assert list(subblock_weights(state, "ffn")) == ["mlp.up_proj.weight"]
    assert list(subblock_weights(state, "attention")) == ["input_layernorm.weight"]


def test_keeping_all_channels_in_another_order_computes_the_same() -> None:
    parent = ffn(5)
    shuffled = keep_channels(parent, torch.tensor([4, 2, 0, 1, 3]))
    x = torch.randn(6, 4)

    def output(w: dict[str, torch.Tensor]) -> torch.Tensor:
        gate = torch.nn.functional.silu(x @ w["mlp.gate_proj.weight"].T)
        return (gate * (x @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T

    torch.testing.assert_close(output(shuffled), output(parent))
