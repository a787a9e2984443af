"""FFN Fusion: consecutive FFNs without attention between them become one wider FFN.

A run X + FFN_i(norm_i(X)), then X + FFN_{i+1}(norm_{i+1}(X)), … is replaced by X + sum_j FFN_j(norm_j(X)), which is
exactly one wider gated FFN. All FFNs of the run then read the same X: that alone is the approximation.

Source: arXiv 2503.18908, section 3, equation 5 and theorem 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from components.core.architecture import LINEAR
from components.search.config import Fusion
from components.search.space import Size
from components.search.variants import Weights

NORM = "post_attention_layernorm.weight"


@dataclass(frozen=True)
class ChildLayer:
    """A decoder layer in the making.

    Attributes:
        num_key_value_heads: KV heads; 0 where there is no attention, `linear` where it is one matrix.
        intermediate_size: channels of the FFN; 0 where there is none, `linear` where it is one matrix.
        weights: tensors by name within the layer; none of what is not there.
        parent_layers: the parent's layers that it stands for, by number, in order.
    """

    num_key_value_heads: Size
    intermediate_size: Size
    weights: Weights
    parent_layers: tuple[int, ...]


def fuse_layers(layers: Sequence[ChildLayer], config: Fusion) -> list[ChildLayer]:
    """The layers that are left when empty ones are dropped and, where wanted, runs of FFNs fused."""
    left = drop_empty(layers)
    return fuse_runs(left, keep_last=config.keep_last) if config.enabled else left


def drop_empty(layers: Sequence[ChildLayer]) -> list[ChildLayer]:
    """The layers that do anything: one without attention and FFN passes its input on."""
    return [layer for layer in layers if layer.num_key_value_heads or layer.intermediate_size]


def fuse_runs(layers: Sequence[ChildLayer], *, keep_last: bool) -> list[ChildLayer]:
    """Fuse every maximal run of consecutive FFNs without attention; a linear one ends a run.

    Args:
        layers: none of them empty.
        keep_last: leave the last FFN of each run a layer of its own.
    """
    fused: list[ChildLayer] = []
    run: list[ChildLayer] = []
    for layer in [*layers, None]:
        if layer is not None and not layer.num_key_value_heads and layer.intermediate_size != LINEAR:
            run.append(layer)
            continue
        fused += _fuse_run(run, keep_last=keep_last)
        run = []
        if layer is not None:
            fused.append(layer)
    return fused


def _fuse_run(run: Sequence[ChildLayer], *, keep_last: bool) -> list[ChildLayer]:
    """One run as one layer, or as one layer and its last."""
    kept = 1 if keep_last else 0
    if len(run) - kept < 2:
        return list(run)
    return [fuse(run[: len(run) - kept]), *run[len(run) - kept :]]


def fuse(run: Sequence[ChildLayer]) -> ChildLayer:
    """One layer whose FFN is the sum of the run's FFNs.

    It has the norm of the run's last layer. What another layer's own norm scales differently is folded into its gate
    and up projections, so that the sum is exact; a channel that the shared norm would erase is scaled there alone.
    """
    last = run[-1].weights[NORM]
    shared = torch.where(last == 0, torch.ones_like(last), last)
    weights: Weights = {NORM: shared}
    for name in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
        weights[name] = torch.cat([layer.weights[name] * (layer.weights[NORM] / shared) for layer in run])
    weights["mlp.down_proj.weight"] = torch.cat([layer.weights["mlp.down_proj.weight"] for layer in run], dim=1)
    if "mlp.down_proj.bias" in run[0].weights:
        for name in ("mlp.gate_proj.bias", "mlp.up_proj.bias"):
            weights[name] = torch.cat([layer.weights[name] for layer in run])
        weights["mlp.down_proj.bias"] = torch.stack([layer.weights["mlp.down_proj.bias"] for layer in run]).sum(dim=0)
    return ChildLayer(
        num_key_value_heads=0,
        intermediate_size=weights["mlp.down_proj.weight"].shape[1],
        weights=weights,
        parent_layers=tuple(number for layer in run for number in layer.parent_layers),
    )
