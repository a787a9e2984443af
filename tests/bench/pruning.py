"""Pruning methods that the search is compared with: depth by two measures, and width by activations.

Shape letters: B rows, T tokens, I neurons of an FFN, G groups of an attention (KV heads), Q query heads of a group,
E head size.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PretrainedConfig

from components.core.model.checkpoint import assign_weights, model_config
from components.core.model.decoder import TesseraConfig, TesseraForCausalLM
from components.core.model.layer_files import state_outside_layers
from components.core.model.layer_numbering import LAYERS
from components.core.text.packing import Batch
from components.search.child.child_model import assemble
from components.search.child.evaluation import held_out_kl
from components.search.child.ffn_fusion import ChildLayer
from components.search.space.subblocks import Weights, keep_channels, most_important, shape_of


def layer_kls(parent: TesseraForCausalLM, batches: Sequence[Batch]) -> list[float]:
    """KL(parent || parent without one layer) of each layer, nats a token."""
    models = [without_layers(parent, {number}) for number in range(len(parent.model.layers))]
    return [found.kl for found in held_out_kl(parent, models, batches)]


@torch.no_grad()
def block_influences(parent: TesseraForCausalLM, batches: Sequence[Batch]) -> list[float]:
    """Block influence of each layer: 1 - cos of its input and its output, mean over tokens.

    Source: arXiv 2403.03853, section 3.
    """
    sums = [0.0] * len(parent.model.layers)

    def add(number: int, mask_BT: Tensor, _: nn.Module, inputs: tuple[Any, ...], output_BTD: Tensor) -> None:
        distance_BT = 1 - F.cosine_similarity(inputs[0].double(), output_BTD.double(), dim=-1)
        sums[number] += float(distance_BT[mask_BT].sum())

    for batch in batches:
        mask_BT = batch.segment_ids_BT > 0
        _run(
            parent,
            batch,
            [
                layer.register_forward_hook(partial(add, number, mask_BT))
                for number, layer in enumerate(parent.model.layers)
            ],
        )
    return [total / sum(batch.num_tokens for batch in batches) for total in sums]


def least(values: Sequence[float], count: int) -> set[int]:
    """Numbers of the `count` least values; of equal ones the first."""
    return set(sorted(range(len(values)), key=lambda number: (values[number], number))[:count])


def without_layers(parent: TesseraForCausalLM, dropped: set[int]) -> TesseraForCausalLM:
    """The parent without some layers; it shares the weights of the others."""

    def read(number: int) -> Weights:
        return dict(parent.model.layers[number].state_dict())

    layers = [
        ChildLayer(heads, width, partial(read, number), (number,))
        for number, (heads, width) in enumerate(shape_of(parent.config))
        if number not in dropped
    ]
    return assemble(parent, layers)


@dataclass(frozen=True)
class Importance:
    """How much each neuron and each group of heads is active, by layer.

    Attributes:
        neurons: (I) of each layer.
        groups: (G) of each layer.
    """

    neurons: list[Tensor]
    groups: list[Tensor]


@torch.no_grad()
def activation_importance(parent: TesseraForCausalLM, batches: Sequence[Batch]) -> Importance:
    """Importance by activations: means over the tokens of a row, then the L2 norm over rows.

    Of a neuron the absolute input of the down projection; of a head the L2 norm of its output before the output
    projection, summed over the query heads of a group. The parent's layers all have attention and FFN.

    Source: arXiv 2407.14679, section 2.2.
    """
    layers, head_dim = parent.model.layers, parent.config.head_dim
    neurons = [torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64) for layer in layers]
    groups = [torch.zeros(layer.self_attn.num_key_value_heads, dtype=torch.float64) for layer in layers]

    def add_squares(totals_X: Tensor, activations_BTX: Tensor, mask_BT: Tensor) -> None:
        means_BX = torch.einsum("btx,bt->bx", activations_BTX.double(), mask_BT) / mask_BT.sum(dim=1)[:, None]
        totals_X += means_BX.square().sum(dim=0)

    def of_neurons(number: int, mask_BT: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        add_squares(neurons[number], inputs[0].abs(), mask_BT)

    def of_groups(number: int, mask_BT: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        heads_BTGQE = inputs[0].unflatten(-1, (len(groups[number]), -1, head_dim))
        add_squares(groups[number], heads_BTGQE.norm(dim=-1).sum(dim=-1), mask_BT)

    for batch in batches:
        mask_BT = (batch.segment_ids_BT > 0).double()
        hooks = []
        for number, layer in enumerate(layers):
            hooks.append(layer.mlp.down_proj.register_forward_pre_hook(partial(of_neurons, number, mask_BT)))
            hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(partial(of_groups, number, mask_BT)))
        _run(parent, batch, hooks)
    return Importance([total_I.sqrt() for total_I in neurons], [total_G.sqrt() for total_G in groups])


def _run(parent: TesseraForCausalLM, batch: Batch, hooks: Sequence[RemovableHandle]) -> None:
    """One forward pass, after which the hooks are gone."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.remove)
        parent.model(batch.input_ids_BT, position_ids=batch.position_ids_BT, segment_ids=batch.segment_ids_BT)


def narrow_config(parent: PretrainedConfig, num_groups: int, intermediate_size: int) -> TesseraConfig:
    """The parent's configuration with fewer groups of heads and neurons, the same in every layer."""
    values = parent.to_dict()
    queries = values["block_configs"][0]["attention"]["n_heads_in_group"]
    block = {
        "attention": {"no_op": False, "n_heads_in_group": queries},
        "ffn": {"no_op": False, "intermediate_size": intermediate_size},
    }
    return model_config(
        {
            **values,
            "num_attention_heads": queries * num_groups,
            "block_configs": [block] * len(values["block_configs"]),
        }
    )


def prune_width(
    parent: TesseraForCausalLM, importance: Importance, num_groups: int, intermediate_size: int
) -> TesseraForCausalLM:
    """A model with the most important groups and neurons of each layer, in the parent's order; hidden size stays."""
    with torch.device("meta"):
        child = TesseraForCausalLM(narrow_config(parent.config, num_groups, intermediate_size))
    child.requires_grad_(False)
    state = state_outside_layers(parent)
    for number, layer in enumerate(parent.model.layers):
        channels = most_important(importance.neurons[number], intermediate_size).sort().values
        groups = most_important(importance.groups[number], num_groups).sort().values
        weights = keep_groups(dict(layer.state_dict()), groups, layer.self_attn.num_key_value_heads)
        weights = keep_channels(weights, channels)
        state |= {f"{LAYERS}{number}.{name}": tensor for name, tensor in weights.items()}
    assign_weights(child, state)
    return child


def keep_groups(layer: Weights, groups: Tensor, num_groups: int) -> Weights:
    """A layer whose attention has only these KV heads, and the query heads that read them.

    Args:
        layer: its tensors.
        groups: numbers of the KV heads that stay.
        num_groups: KV heads that there are.
    """
    kept = dict(layer)
    for name, tensor in layer.items():
        if name.startswith(("self_attn.q_proj.", "self_attn.k_proj.", "self_attn.v_proj.")):
            kept[name] = tensor.unflatten(0, (num_groups, -1))[groups].flatten(0, 1).clone()
    columns = layer["self_attn.o_proj.weight"].unflatten(1, (num_groups, -1))
    kept["self_attn.o_proj.weight"] = columns[:, groups].flatten(1, 2).clone()
    return kept
